"""`ibnorm-export`: a command is options -> one library call -> print. Exceptions become exit codes here.

Exit codes: 0 good; 1 a gate failed; 2 bad input or usage; 3 backend not available; 70 internal
error; 130 interrupted (`__main__`); 141 nobody reads stdout any more.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from ibnorm_export import __version__
from ibnorm_export.cli.analyze import analyze_command
from ibnorm_export.cli.bench import bench_command
from ibnorm_export.cli.build_engine import build_engine_command
from ibnorm_export.cli.check import check_command
from ibnorm_export.cli.compare import compare_command
from ibnorm_export.cli.console import err, print_json
from ibnorm_export.cli.demo import demo_command
from ibnorm_export.cli.doctor import doctor_command
from ibnorm_export.cli.export import export_command
from ibnorm_export.cli.generate import generate_command
from ibnorm_export.cli.inspect import inspect_command
from ibnorm_export.cli.package import package_command
from ibnorm_export.cli.serve import serve_command
from ibnorm_export.cli.verify import verify_command
from ibnorm_export.errors import IBNormError

__all__ = ["app", "main"]

# typer carries its own copy of click in recent versions; this is UsageError in all of them.
_UsageError: Any = typer.BadParameter.__base__

INTERNAL_ERROR = 70
BROKEN_PIPE = 141  # as the shell says of a program that SIGPIPE ended

app = typer.Typer(
    name="ibnorm-export",
    help="Export, verify and benchmark models that normalise with IBNorm. Start with: ibnorm-export demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ibnorm-export {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, show the traceback too.")] = False,
) -> None:
    pass


app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("bench")(bench_command)
app.command("compare")(compare_command)
app.command("check")(check_command)
app.command("analyze")(analyze_command)
app.command("build-engine")(build_engine_command)
app.command("generate")(generate_command)
app.command("package")(package_command)
app.command("serve")(serve_command)
app.command("inspect")(inspect_command)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)


def _fail(message: str, code: int, *, kind: str) -> int:
    line = " ".join(message.split())
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):  # a full disk, a reader that has gone: the exit code is left
            print_json({"error": {"kind": kind, "message": line}, "exit_code": code})
            sys.stdout.flush()
    with contextlib.suppress(OSError):
        err.print(f"ibnorm-export: {line}", style="bold red", markup=False)
    return code


def main() -> int:
    """Run the command of `sys.argv`.

    Returns:
        The exit code. Some versions of typer turn an interrupt into 130, others let it pass.

    Raises:
        KeyboardInterrupt: the command was interrupted.
    """
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return code or BROKEN_PIPE
        return code or _fail(f"stdout: {error.strerror}", 2, kind="system")
    return code


def _run() -> int:
    try:
        result = app(standalone_mode=False)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's answer, and typer's
            return BROKEN_PIPE
        return _fail(f"the code of the model ended the program: {error.code}", 2, kind="system")
    except IBNormError as error:
        return _fail(str(error), error.exit_code, kind=type(error).__name__)
    except _UsageError as error:
        if not error.format_message():  # no arguments at all: the help was shown
            return 2
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        return _fail(f"{error.format_message()}{hint}", 2, kind="usage")
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except MemoryError as error:
        return _fail(f"not enough memory: {error or 'use a smaller model or a machine with more'}", 2, kind="memory")
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 2, kind="system")
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error}. Please report it, with the output of "
            "`ibnorm-export --debug ...`",
            INTERNAL_ERROR,
            kind="internal",
        )
    return result if isinstance(result, int) else 0
