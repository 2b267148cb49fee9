"""The help of a command: options in groups, each on its own line with its text below, no word ever broken."""

from __future__ import annotations

import enum
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from ibnorm_export.cli.console import out

__all__ = ["COMMAND_GROUPS", "PANELS", "HelpCommand", "HelpGroup", "parameter_entry", "parameter_groups", "value_types"]

#: The commands by what a person wants, in the order of the list.
COMMAND_GROUPS: Final = {
    "Start": ("demo", "doctor"),
    "Models and files": ("import", "export", "inspect", "identify", "build-engine"),
    "Checks": ("verify", "evaluate", "check", "analyze", "explain"),
    "Speed": ("bench", "compare"),
    "Use": ("generate", "package", "serve", "schema"),
}

#: The group of each option, by its long name; what is in none of them is shown under "General".
PANELS: Final = {
    "Input": (
        *("--model", "--weights", "--inputs", "--expected", "--expected-dtype", "--text", "--checkpoint", "--batch"),
        *("--seq", "--prompts", "--batches", "--init", "--file", "--labels", "--samples", "--seed", "--prompt"),
        *("--data", "--task", "--tasks", "--against", "--limit", "--max-length", "--stride", "--max-unreadable"),
        *("--preprocessing", "--from", "--norm-class", "--norm-args", "--norm", "--settings", "--args", "--shape"),
        *("--coverage", "--stress", "--plan", "--allow", "--tokenizer"),
    ),
    "Output": (
        *(
            "--output",
            "--report",
            "--save-baseline",
            "--results",
            "--target",
            "--for",
            "--opset",
            "--inline",
            "--cache",
        ),
        *("--out", "--format", "--name", "--mount", "--storage-uri", "--json", "--log", "--layers", "--variant"),
        *("--timing-cache", "--embed-plugin", "--sweep", "--prefer"),
    ),
    "Numerics": (
        *("--dtype", "--block-size", "--head-dtype", "--numeric-only", "--max-drop", "--dtypes", "--lambdas"),
        *("--alpha", "--kernel-width", "--max-ratio", "--temperature", "--top-p", "--max-new-tokens", "--max-steps"),
    ),
    "Speed": (
        *(
            "--kernels",
            "--require-fused",
            "--fuse-skip",
            "--threads",
            "--rounds",
            "--loading",
            "--max-batch",
            "--max-queue",
        ),
        *("--queue-timeout", "--queue-delay", "--instances", "--workspace"),
    ),
    "Runtime": (
        *("--backend", "--engine", "--provider", "--npm", "--url", "--runtime", "--profile", "--gpu"),
        *("--compute-capability",),
    ),
    "Server": (
        *("--address", "--http-port", "--grpc-port", "--metrics-port", "--concurrency", "--max-waiting"),
        *("--max-request", "--max-seconds", "--finish-seconds", "--allowed-host", "--admin"),
        *("--model-name", "--chat-template", "--api-key", "--api-key-file", "--log-requests"),
    ),
}

#: Columns of a page at most, and spaces before the text of an option.
_WIDTH: Final = 100
_INDENT: Final = " " * 6

#: An option and its value, which stay on one line of an example.
_OPTION_AND_VALUE: Final = re.compile(r"(--?[a-z][\w-]*) (?!-)(\S+)")


def value_types(function: Callable[..., Any]) -> dict[str, type]:
    """Return the type of one value of each parameter: the enum of a list of members, the int of `int | None`."""
    found = {}
    for name, hint in typing.get_type_hints(function).items():
        kinds = [hint, *typing.get_args(hint)]
        kinds += [part for kind in kinds for part in typing.get_args(kind)]
        plain = [kind for kind in kinds if isinstance(kind, type) and kind not in (list, type(None))]
        found[name] = next((kind for kind in plain if not typing.get_args(kind)), str)
    return found


class HelpCommand(TyperCommand):
    """A command that prints its help as this module lays it out."""

    #: Types of the values by parameter; the loader sets them.
    types: Mapping[str, type] = {}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _write(formatter, _command_lines(self, ctx))


class HelpGroup(TyperGroup):
    """The group of commands, whose help lists each of them with one line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        _write(formatter, _group_lines(self, ctx))


def _width() -> int:
    return max(40, min(_WIDTH, shutil.get_terminal_size((80, 24)).columns))


def _write(formatter: Any, lines: Iterator[Text]) -> None:
    """Hand over the lines, with styles only where a terminal shows them."""
    styled = out.is_terminal and not out.no_color and not out.is_dumb_terminal
    for line in lines:
        text = line.plain
        for span in reversed(line.spans) if styled else ():
            part = typer.style(text[span.start : span.end], bold="bold" in str(span.style), fg=_colour(span.style))
            text = text[: span.start] + part + text[span.end :]
        formatter.write(f"{text}\n")


def _colour(style: object) -> str | None:
    return next((name for name in ("cyan", "yellow") if name in str(style)), None)


def _wrapped(text: str, indent: str = "") -> Iterator[Text]:
    """The words of a text on lines that fit; no word is broken, not even at a hyphen."""
    lines = textwrap.wrap(
        " ".join(text.split()),
        _width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield from map(Text, lines)


def _example(text: str) -> Iterator[Text]:
    """A command that can be copied as it stands: a line that does not fit ends in a backslash."""
    yield Text("Example:", "bold")
    together = _OPTION_AND_VALUE.sub(r"\1\0\2", text)
    broken = textwrap.wrap(together, _width() - 6, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in broken]
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        yield Text(f"  {'  ' if number else ''}{line}{'' if last else ' '}{'' if last else chr(92)}")


def _command_lines(command: HelpCommand, ctx: Any) -> Iterator[Text]:
    groups = parameter_groups(command, ctx)
    arguments = groups["Arguments"]
    yield Text("")
    yield Text.assemble(
        ("Usage: ", "bold"), f"{ctx.command_path} [OPTIONS] {' '.join(map(_usage, arguments))}".rstrip()
    )
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield Text("")
        what, marker, example = paragraph.partition("Example: ")
        yield from _wrapped(what)
        if marker:
            yield from _example(" ".join(example.split()))
    for title, members in groups.items():
        if members:
            yield Text("")
            yield Text(title, "bold yellow")
        for member in members:
            yield from _parameter_lines(member, command.types.get(member.name, str))


def parameter_groups(command: Any, ctx: Any) -> dict[str, list[Any]]:
    """Return the arguments and options of a command that its help shows, by the title of their group."""
    groups: dict[str, list[Any]] = {"Arguments": []} | {name: [] for name in PANELS} | {"General": []}
    for parameter in command.get_params(ctx):
        if not getattr(parameter, "hidden", False):
            groups["Arguments" if parameter.param_type_name == "argument" else _panel(parameter)].append(parameter)
    return groups


def _panel(option: Any) -> str:
    if option.rich_help_panel:
        return str(option.rich_help_panel)
    return next((title for title, names in PANELS.items() if set(names) & set(option.opts)), "General")


def _usage(argument: Any) -> str:
    name = _placeholder(argument)
    return name if argument.required else f"[{name}]"


def _placeholder(parameter: Any, kind: type = str) -> str:
    """What stands for the value: its metavar, a letter for a number, or the last word of its name."""
    if parameter.metavar:
        return str(parameter.metavar)
    if kind in (int, float):
        return "N" if kind is int else "X"
    return str(parameter.name).rpartition("_")[2].upper()


def parameter_entry(parameter: Any, kind: type, *, width: int = 1000) -> tuple[str, str, str]:
    """Return how an argument or option is written, its value, and what it is for.

    Args:
        parameter: the argument or option.
        kind: the type of its value.
        width: where names and choices are longer, the choices are part of the last text.
    """
    choices = tuple(member.value for member in kind) if issubclass(kind, enum.StrEnum) else ()
    about = [(parameter.help or "").strip()]
    if parameter.param_type_name == "argument":
        names, value = _placeholder(parameter), ""
    else:
        # the short name first, as everybody writes it
        names = ", ".join(sorted(parameter.opts, key=len))
        names += "".join(f" / {name}" for name in parameter.secondary_opts)
        value = "" if getattr(parameter, "is_flag", False) else f" {_placeholder(parameter, kind)}"
        listed = f" {'|'.join(choices)}"
        if choices and len(names) + len(listed) + 2 <= width:
            value = listed
        elif choices:
            about.append(f"One of: {', '.join(choices)}.")
        if getattr(parameter, "multiple", False):
            value += " ..."
    about += [f"[{note}]" for note in _notes(parameter)]
    return names, value, " ".join(part for part in about if part)


def _parameter_lines(parameter: Any, kind: type) -> Iterator[Text]:
    names, value, about = parameter_entry(parameter, kind, width=_width())
    yield Text.assemble("  ", (names, "cyan"), value)
    yield from _wrapped(about, _INDENT)


def _notes(parameter: Any) -> Iterator[str]:
    """The default, the range, and whether the value must be given."""
    least, most = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if least is not None or most is not None:
        yield " ".join(
            [*([] if least is None else [f"at least {least:g}"]), *([] if most is None else [f"at most {most:g}"])]
        )
    if parameter.required:
        yield "required"
    elif isinstance(shown := getattr(parameter, "show_default", None), str):
        yield f"default: {shown}"
    elif not (getattr(parameter, "is_flag", False) and not parameter.secondary_opts):
        default = parameter.default
        default = getattr(default, "value", default)
        if isinstance(default, bool):
            default = (parameter.opts if default else parameter.secondary_opts)[0]
        if default not in (None, "", ()) and not callable(default):
            yield f"default: {default}"


def _group_lines(group: HelpGroup, ctx: Any) -> Iterator[Text]:
    yield Text("")
    yield Text.assemble(("Usage: ", "bold"), f"{ctx.command_path} [OPTIONS] COMMAND [ARGS]...")
    yield Text("")
    yield from _wrapped(group.help or "")
    grouped = {name for names in COMMAND_GROUPS.values() for name in names}
    others = tuple(name for name in group.commands if name not in grouped)
    column = max(map(len, group.commands)) + 4
    for title, names in (*COMMAND_GROUPS.items(), ("Other", others)):
        if not names:
            continue
        yield Text("")
        yield Text(title, "bold yellow")
        for name in names:
            lines = list(_wrapped(group.commands[name].help or "", " " * column))
            yield Text.assemble("  ", (name, "cyan"), lines[0].plain[2 + len(name) :])
            yield from lines[1:]
    yield Text("")
    yield Text("General", "bold yellow")
    for option in group.get_params(ctx):
        yield from _parameter_lines(option, str)
    yield Text("")
    yield from _wrapped(group.epilog or "")
