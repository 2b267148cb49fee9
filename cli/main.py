"""The command group `ibnorm-export`: its commands, each imported when it is run, and the exit code of each exception.

A command reads its options, makes one library call, and prints the result.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from ibnorm_export import __version__
from ibnorm_export.cli.console import Verbosity, err, print_json
from ibnorm_export.cli.help_page import HelpCommand, HelpGroup, value_types
from ibnorm_export.cli.hints import hint_of
from ibnorm_export.errors import ExitCode, IBNormError, message_text
from ibnorm_export.json_text import SCHEMA_VERSION

__all__ = ["COMMANDS", "app", "main", "module_of"]

# typer carries its own copy of click in recent versions; this is UsageError in all of them.
_UsageError: Any = typer.BadParameter.__base__

#: Name of each command and its line in the list. The function `NAME_command` is in the module `cli.NAME`, for the NAME
#: that `module_of` returns.
COMMANDS: Final = {
    "import": "Turn a training code's checkpoint into a folder that every command takes.",
    "export": "Write a trained checkpoint as ONNX, one node for each norm.",
    "verify": "Compare an exported file with its checkpoint.",
    "bench": "Measure latency, and compare it with PyTorch.",
    "compare": "Decide whether one measurement is slower than another.",
    "evaluate": "Measure accuracy or perplexity of models, and compare them.",
    "check": "Run every export, comparison and latency budget of one configuration file.",
    "analyze": "Report what each norm does to the values that reach it.",
    "build-engine": "Build a TensorRT engine.",
    "generate": "Generate text with an exported language model.",
    "package": "Write a model repository for Triton.",
    "serve": "Serve a model on this machine.",
    "identify": "Find out which IBNorm a norm of your own code is.",
    "explain": "Explain a finding by its code, such as IBN103.",
    "inspect": "Describe an exported file or a checkpoint.",
    "schema": "Print the JSON Schema of what a command prints with --json.",
    "doctor": "Report which runtimes and libraries work on this machine.",
    "demo": "Train, export, verify and benchmark two small models.",
}

_EPILOG: Final = (
    "Exit codes: 0 success; 1 a check failed; 2 bad input or usage; 3 a runtime, library or device is missing; "
    "70 internal error; 130 interrupted; 141 broken pipe."
)

#: Other spellings of a value that every option accepts.
_SPELLINGS: Final = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}


def _usual_spelling(word: str) -> str:
    """The name of an option or value as its enum spells it."""
    return _SPELLINGS.get(word, word)


_CONTEXT: Final = {"help_option_names": ["-h", "--help"], "token_normalize_func": _usual_spelling}

_Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Print the result only: no progress, no notes, no next step.")
]
_Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Also print each step with its time, and the traceback of an error.")
]


def module_of(command: str) -> str:
    """Name of the module of a command. Python keeps the word `import` for itself."""
    return "import_checkpoint" if command == "import" else command.replace("-", "_")


def _with_verbosity(function: Callable[..., None]) -> Callable[..., None]:
    """The function of a command with the options -q and -v, which every command has."""
    signature = inspect.signature(function, eval_str=True)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword_only, default=False, annotation=kind)
        for name, kind in (("quiet", _Quiet), ("verbose", _Verbose))
    ]

    @functools.wraps(function)
    def command(*, quiet: bool, verbose: bool, **given: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose exclude each other: leave one of them out")
        err.verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL
        function(**given)

    vars(command)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *added])
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    command.__annotations__ |= {p.name: p.annotation for p in added}
    return command


def _load_command(name: str) -> Any:
    """Import the module of a command and build the command."""
    module = module_of(name)
    function: Callable[..., None] = getattr(importlib.import_module(f"ibnorm_export.cli.{module}"), f"{module}_command")
    single = typer.Typer(add_completion=False, context_settings=_CONTEXT, pretty_exceptions_enable=False)
    single.command(name, cls=HelpCommand)(_with_verbosity(function))
    command: Any = typer.main.get_command(single)
    command.types = value_types(function)
    return command


class _LazyGroup(HelpGroup):
    """Lists commands by name and one line; imports only the one that is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub if stub is None else _load_command(str(stub.name)), rest


app = typer.Typer(
    cls=_LazyGroup,
    name="ibnorm-export",
    help="Export, verify, benchmark and serve models that normalise with IBNorm. Start with: ibnorm-export demo",
    epilog=_EPILOG,
    no_args_is_help=True,
    context_settings=_CONTEXT,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ibnorm-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an internal error.")] = False,
) -> None:
    pass


def _stub() -> None:
    """Stands for a command in the list; `_LazyGroup` puts the command in its place."""


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_stub)


def _fail(message: str, code: ExitCode = ExitCode.BAD_INPUT, *, kind: str) -> ExitCode:
    """Report an error in one line on stderr, and with --json as an object on stdout too."""
    line = message_text(" ".join(message.split()))
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):  # a full disk or a broken pipe: the exit code still reports the error
            error = {"kind": kind, "message": line}
            print_json({"schema_version": SCHEMA_VERSION, "error": error, "exit_code": code})
            sys.stdout.flush()
    with contextlib.suppress(OSError):
        err.print(f"ibnorm-export: {line}", style="bold red")
    return code


def _show_loading() -> None:
    """Show which command is loading, before typer reads the options: it imports pydantic for that."""
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if name in COMMANDS and not {"-h", "--help"} & set(sys.argv):  # typer prints the help itself, and quickly
        err.show_loading(f"loading {name}")


def main() -> int:
    """Run the command that `sys.argv` names.

    Returns:
        The exit code; see `ExitCode`. Some versions of typer turn an interrupt into 130, others raise it.

    Raises:
        KeyboardInterrupt: the command was interrupted.
    """
    err.verbosity = Verbosity.NORMAL
    _show_loading()
    try:
        code = _run()
    finally:
        err.clear_loading()
    try:
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return code or ExitCode.BROKEN_PIPE
        return code or _fail(f"stdout: {error.strerror}", kind="system")
    return code


def _ended_by_typer(error: SystemExit) -> bool:
    """Whether typer ended the program: it has answered a shell that completes a word, or installed that."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__")).startswith("typer.")


def _usage_message(error: Any) -> str:
    """The message of a usage error, with what was probably meant and where to read on."""
    # without typer's own list of possible options, which is long
    message = error.message if "No such option" in str(error.message) else error.format_message()
    context = error.ctx
    parameters = [] if context is None else context.command.get_params(context)
    options = [name for parameter in parameters for name in parameter.opts if name.startswith("-")]
    message = message.replace("Value error, ", "")  # pydantic's, which typer keeps
    hint = hint_of(message, options)
    message = f"{message.rstrip('.')}; {hint}" if hint else message
    return message if context is None else f"{message} (see {context.command_path} --help)"


def _run() -> int:
    try:
        result = app(prog_name="ibnorm-export", standalone_mode=False)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich and typer exit on a broken pipe
            return ExitCode.BROKEN_PIPE
        if _ended_by_typer(error):
            return error.code if isinstance(error.code, int) else ExitCode.SUCCESS
        return _fail(f"the model's own code ended the program: {error.code}", kind="system")
    except IBNormError as error:
        return _fail(str(error), error.exit_code, kind=type(error).__name__)
    except _UsageError as error:
        if not error.format_message():  # there were no arguments, and the help was printed
            return ExitCode.BAD_INPUT
        return _fail(_usage_message(error), kind="usage")
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except MemoryError as error:
        return _fail(f"not enough memory: {error or 'use a smaller model or a machine with more'}", kind="memory")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", kind="system")
    except Exception as error:
        if isinstance(error, SystemError) and "without setting an exception" in str(error):
            # PyTorch's constructors fail like this, not with MemoryError, where Python itself has no memory left.
            return _fail("not enough memory: use a smaller model or a machine with more", kind="memory")
        if {"--debug", "--verbose", "-v"} & set(sys.argv):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}. Please report it with the output of "
            "`ibnorm-export --debug ...`",
            ExitCode.INTERNAL_ERROR,
            kind="internal",
        )
    return result if isinstance(result, int) else 0
