"""The reference pages of the documentation site, written from the code, so that no copy can become stale.

Each function of `PAGES` returns the Markdown of one page. `scripts/site_hooks.py` gives them to MkDocs.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from textwrap import indent
from typing import Any, Final

from typer.main import get_command

import ibnorm_export
from ibnorm_export import json_document
from ibnorm_export.artifacts.metadata import METADATA_FORMAT, ModelMetadata, QuantizationEntry
from ibnorm_export.cli.help_page import parameter_entry, parameter_groups
from ibnorm_export.cli.main import COMMANDS, app
from ibnorm_export.errors import ExitCode
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate import config

__all__ = ["PAGES"]


def cell(text: str) -> str:
    """Return a text as the cell of a table: on one line, without a bar that would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _page(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def code(text: object) -> str:
    """Return a text as code, also if it has backticks."""
    return f"`{text}`" if "`" not in str(text) else f"`` {text} ``"


_SECTION: Final = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Source|Note|Example):[ \t]*", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring in parts: the text, and the body of each section by its name."""

    text: str
    sections: dict[str, str]

    def entries(self, section: str) -> dict[str, str]:
        """The entries `name: description` of a section. A description may continue on indented lines."""
        found: dict[str, str] = {}
        names: list[str] = []
        for line in inspect.cleandoc("\n" + self.sections.get(section, "")).splitlines():
            match = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: (.*)", line)
            if match:
                names = [name.lstrip("*") for name in match[1].split(", ")]
                found.update(dict.fromkeys(names, match[2]))
            elif names:
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
        return found


def docstring(thing: object) -> Docstring:
    """Read the docstring of a function or class."""
    text = inspect.getdoc(thing) or ""
    parts = _SECTION.split(text)
    return Docstring(parts[0].strip(), dict(zip(parts[1::2], parts[2::2], strict=True)))


# --------------------------------------------------------------------------------------------- commands


def commands() -> str:
    """Every command with its arguments and options, from the program itself."""
    group: Any = get_command(app)
    lines = [
        "# Commands",
        "This page is written from the program. `ibnorm-export COMMAND --help` prints the same in a terminal.",
        table(["command", "what it does"], ([f"[`{n}`](#{n})", text] for n, text in COMMANDS.items())),
        "## Before the command",
        _options(group, group.make_context("ibnorm-export", ["doctor"], resilient_parsing=True)),
    ]
    for name in COMMANDS:
        context = group.make_context("ibnorm-export", [name], resilient_parsing=True)
        _, command, _ = group.resolve_command(context, [name])
        lines += _command(name, command, command.make_context(name, [], resilient_parsing=True))
    return _page(*lines)


def _command(name: str, command: Any, context: Any) -> list[str]:
    text, _, examples = inspect.cleandoc(command.help or "").partition("Example")
    lines = [f"## {name}", text.strip()]
    usage = command.get_usage(context).partition(f"{name} ")[2].replace("[OPTIONS]", "")
    usage = " ".join(usage.replace("{", "").replace("}", "").split())
    lines.append(f"```text\nibnorm-export {name} {usage} [OPTIONS]\n```".replace("  ", " "))
    if examples:
        lines_below = (line.strip() for line in examples.lstrip("s: ").splitlines())
        shown = [line for line in lines_below if line.startswith("ibnorm-export")]
        if shown:
            lines += ["Example:", "```text\n" + "\n".join(shown) + "\n```"]
    return [*lines, _options(command, context)]


def _options(command: Any, context: Any) -> str:
    """A command's parameters as a list, those of each group together: on a phone a table would break their names."""
    kinds = getattr(command, "types", {})
    parts = []
    for title, parameters in parameter_groups(command, context).items():
        parts += [f"**{title}**"] if parameters else []
        for parameter in parameters:
            names, value, text = parameter_entry(parameter, kinds.get(parameter.name, str))
            parts.append(f"{code(f'{names}{value}')}\n:   {' '.join(text.split())}")
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------- Python

#: The groups of the page, each with a rule that says which of the remaining names belong to it.
_GROUPS: Final[dict[str, Callable[[str, Any], bool]]] = {
    "Functions": lambda name, thing: inspect.isfunction(thing),
    "Errors": lambda name, thing: inspect.isclass(thing) and issubclass(thing, Exception),
    "Choices": lambda name, thing: inspect.isclass(thing) and issubclass(thing, enum.Enum),
    "Options": lambda name, thing: (
        name.endswith(("Options", "Limits")) or name in ("Quantization", "Timing", "Endpoint")
    ),
    "Reports": lambda name, thing: name.endswith("Report"),
    "The operator and its description": lambda name, thing: "Norm" in name or name == "LayerRule",
    "Models and files": lambda name, thing: True,
}


def python_api() -> str:
    """Every public name with its signature and its docstring."""
    names = {name: getattr(ibnorm_export, name) for name in ibnorm_export.__all__}
    lines = [
        "# Python API",
        "These are all public names. Import each from the package: `from ibnorm_export import export`. Every other "
        "module may change in any version. Arguments after `*` are passed by name.",
    ]
    for title, belongs in _GROUPS.items():
        chosen = [name for name, thing in names.items() if belongs(name, thing)]
        lines.append(f"## {title}")
        for name in chosen:
            lines += [f"### {name}", *_entry(name, names.pop(name))]
    return _page(*lines)


def _entry(name: str, thing: Any) -> list[str]:
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return _choices(thing)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return [docstring(thing).text, f"Exit code {int(thing.exit_code)}."]
    lines = [f"```python\n{_signature(name, thing)}\n```", *_prose(thing)]
    if inspect.isclass(thing):
        lines += _members(thing)
    return lines


def _prose(thing: Any) -> list[str]:
    read = docstring(thing)
    lines = [read.text]
    if arguments := read.entries("Args"):
        rows = [(code(name), text) for name, text in arguments.items()]
        lines += ["**Arguments**", table(["name", "meaning"], rows)]
    for section in ("Returns", "Yields"):
        if section in read.sections:
            lines.append(f"**{section}**: {cell(read.sections[section])}")
    if raised := read.entries("Raises"):
        lines += ["**Raises**", table(["error", "when"], ((code(name), text) for name, text in raised.items()))]
    return [line for line in lines if line]


def _choices(thing: type[enum.Enum]) -> list[str]:
    lines = [docstring(thing).text]
    meanings = _member_docstrings(thing)
    rows = [(code(f"{thing.__name__}.{m.name}"), code(repr(m.value)), meanings.get(m.name, "")) for m in thing]
    if not meanings:
        return [*lines, table(["member", "value"], (row[:2] for row in rows))]
    return [*lines, table(["member", "value", "meaning"], rows)]


def _member_docstrings(thing: type[enum.Enum]) -> dict[str, str]:
    """The text under or beside each member of an enum, which Python does not keep."""
    source = inspect.getsource(thing)
    under = re.findall(r'^    (\w+) = [^\n]+\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    beside = re.findall(r"^    (\w+) = \S+  # ([^\n]+)", source, re.MULTILINE)
    return dict([*beside, *under])


def _members(thing: type) -> list[str]:
    """Public methods and properties that the class itself defines and describes."""
    rows = []
    for name, member in vars(thing).items():
        value = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        if value.__doc__ and (text := docstring(value).text):  # not what a base class of another package says
            call = name if isinstance(value, property) else f"{name}{_parameters(value, skip_self=True)}"
            rows.append((code(call), text))
    return ["**Members**", table(["member", "meaning"], rows)] if rows else []


def _signature(name: str, thing: Any) -> str:
    """The signature of a function or class, one argument on each line where it is long."""
    text = f"{name}{_parameters(thing, skip_self=False)}"
    if len(text) <= 76:
        return text
    inner = _parameter_list(thing, skip_self=False)
    return f"{name}(\n" + "".join(f"    {part},\n" for part in inner) + ")"


def _parameters(thing: Any, *, skip_self: bool) -> str:
    return f"({', '.join(_parameter_list(thing, skip_self=skip_self))})"


def _parameter_list(thing: Any, *, skip_self: bool) -> list[str]:
    parts: list[str] = []
    star = False
    for parameter in inspect.signature(thing).parameters.values():
        if skip_self and parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        star = star or parameter.kind is parameter.VAR_POSITIONAL
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        parts.append(f"{prefix}{parameter.name}{default}")
    return parts


def _default(value: object) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}()"
    text = repr(value)
    return "..." if "<" in text else text


# --------------------------------------------------------------------------------------------- check.toml


def check_toml() -> str:
    """Every table and key of check.toml, with its type and default."""
    lines = [
        "# Keys of check.toml",
        "`ibnorm-export check` reads this file; `check --init CHECKPOINT` writes one to start from. An unknown key "
        "is an error. Paths are relative to the folder of the file. How to use it: "
        "[gate CI](../how-to/gate-ci.md).",
    ]
    titles = {
        "The file": config.CheckConfig,
        "[[export]]": config.ExportCheck,
        "[export.parity]": config.ParityCheck,
        "[[export.latency]]": config.LatencyBudget,
        "[[export.evaluate]]": config.EvaluationCheck,
    }
    for title, kind in titles.items():
        heading = title if "[" not in title else f"`{title}`"
        lines += [f"## {heading}", docstring(kind).text, _keys(kind)]
    return _page(*lines)


#: What keys mean that the classes do not describe, because their names are those of options of `export`.
_LIKE_OPTIONS: Final = {
    "name": "a name of your choice; it becomes the name of the exported file",
    "checkpoint": "the folder or file of the checkpoint",
    "model": 'your own model, `"package.module:factory"`',
    "weights": "which weights, where the checkpoint has both",
    "file": "an existing export to check, in place of a new one",
    "task": "what to export for",
    "dtype": "type of the file",
    "opset": "opset of the file; the default is that of the architecture",
    "inline": "expand the norms into standard operators",
    "fuse_skip": "fuse a residual addition with the norm after it",
    "parity": "how the file is compared with the checkpoint: a table, below",
    "latency": "limits on its time: tables, below",
    "evaluate": "whether it still does its task: tables, below",
    "export": "what to check: tables, below",
    "results": "folder for the reports and the exported files",
    "format": "version of this format",
}


def _keys(kind: type) -> str:
    described = docstring(kind).entries("Args")
    hints = typing.get_type_hints(kind)
    rows = []
    for field in dataclasses.fields(kind):
        text = described.get(field.name) or _LIKE_OPTIONS.get(field.name)
        if text is None:
            raise ValueError(f"{kind.__name__}.{field.name} has no description for docs/reference/check-toml.md")
        default = '`"check-results"`' if field.name == "results" else _key_default(field)
        rows.append((code(field.name), _type_name(hints[field.name]), default, text))
    return table(["key", "type", "default", "meaning"], rows)


def _key_default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING or field.default in (None, ()):
        return "none"
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if isinstance(value, enum.Enum):
        return code(f'"{value.value}"')
    if isinstance(value, tuple):
        return code("[" + ", ".join(f'"{part}"' for part in value) + "]")
    return code(str(value).lower() if isinstance(value, bool) else value)


def _type_name(kind: Any) -> str:
    """A type in the words of TOML."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(part) for part in inner if part is not type(None))
    if origin is tuple:
        return f"list of {_type_name(inner[0])}"
    if dataclasses.is_dataclass(kind):
        return "table"
    if issubclass(kind, enum.Enum):
        return ", ".join(code(f'"{member.value}"') for member in kind)
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    return names.get(kind, "path")


# --------------------------------------------------------------------------------------------- exit codes, metadata


def exit_codes() -> str:
    """The exit codes of every command."""
    meanings = _member_docstrings(ExitCode)
    rows = [(str(int(m)), m.name.lower().replace("_", " "), meanings.get(m.name, "")) for m in ExitCode]
    kinds = [getattr(ibnorm_export, name) for name in ibnorm_export.__all__]
    kinds = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Exception)]
    errors = [(code(kind.__name__), str(int(kind.exit_code)), docstring(kind).text) for kind in kinds]
    return _page(
        "# Exit codes",
        "Every command ends with one of these. A program should read the code and, with `--json`, the object on "
        "standard output; the text of a message may change in any version.",
        table(["code", "name", "meaning"], rows),
        "## Errors in Python",
        "A call from Python raises one of these. All are subclasses of `IBNormError`, and `error.exit_code` is the "
        "code that the command ends with.",
        table(["error", "exit code", "meaning"], errors),
    )


def metadata() -> str:
    """What an exported file states about itself."""
    return _page(
        "# Metadata of a file",
        "An exported file states how it was made, in the `metadata_props` of the ONNX model. Every key begins "
        "with `ibnorm.`. `ibnorm-export inspect FILE` prints them, and `verify` holds the file to them. A program "
        "reads them without this package:",
        '```python\nimport onnx\n\nmodel = onnx.load("vit.onnx", load_external_data=False)\n'
        "print({entry.key: entry.value for entry in model.metadata_props})\n```",
        f"This is format {METADATA_FORMAT}. A later version may add keys. It never removes a key that readers need, "
        "and never gives one another meaning, without a new format number.",
        _fields(ModelMetadata),
        "## Entries of quantization",
        docstring(QuantizationEntry).text,
        _fields(QuantizationEntry),
    )


def _fields(kind: type) -> str:
    described = docstring(kind).entries("Args")
    return table(["key", "meaning"], ((code(f.name), described.get(f.name, "")) for f in dataclasses.fields(kind)))


# --------------------------------------------------------------------------------------------- JSON


#: Keys of every document, and what they mean.
_EVERY_DOCUMENT: Final = {
    "schema_version": "version of these schemas; it grows when a key is removed or gets another meaning",
    "command": "the command that printed the document",
    "version": "version of ibnorm-export",
    "date": "when it was printed",
    "environment": "the machine and the versions of libraries",
    "files": "path, size and SHA-256 of every file that the command read or wrote",
}


def json_output() -> str:
    """What each command prints with --json: the keys of its document, from the published schemas."""
    lines = [
        "# JSON output",
        "Every command takes `--json`. It then prints one JSON document on standard output, and nothing else there. "
        "Progress and notes go to standard error.",
        "```text\nibnorm-export inspect CHECKPOINT --json\n```",
        "Each document has a schema (JSON Schema, draft 2020-12). The files are below, `ibnorm-export schema COMMAND` "
        'prints one, and in Python [`json_schema("COMMAND")`](python.md#json_schema) returns it. Hold what you read to '
        "it, with the package jsonschema:",
        "```python\nimport json\nimport pathlib\n\nimport jsonschema\nfrom ibnorm_export import json_schema\n\n"
        'document = json.loads(pathlib.Path("verify.json").read_text())\n'
        'jsonschema.validate(document, json_schema("verify"))\n```',
        "Tests hold the output of every command to its schema.",
        "`lambda` and `epsilon` of a norm are in canonical form, f(r) = g(r / lambda), whatever the "
        "[convention](../concepts/operator.md) of the checkpoint is. `stated` of `inspect CHECKPOINT` is what it "
        "states, as it is written.",
        "## Every document",
        table(["key", "meaning"], [(code(key), text) for key, text in _EVERY_DOCUMENT.items()]),
        "An error is a document too. Its `exit_code` is that of the command, and `error.kind` the name of the "
        "[error class](exit-codes.md#errors-in-python), or `usage`, `system`, `memory` or `internal`:",
        '```json\n{"error": {"kind": "CheckpointError", "message": "..."}, "exit_code": 2}\n```',
        'A number that is not finite is a text: `"nan"`, `"inf"` or `"-inf"`. Fields are added in any version. A field '
        "is removed or renamed in a minor version only, with a line in the changelog.",
    ]
    for command in json_document.schema_names():
        schema = json_document.json_schema(command)
        kinds = [kind for kind in schema.get("anyOf", [schema]) if "error" not in kind.get("properties", {})]
        lines += [f"## {command}", f"Schema: [{command}.schema.json](schemas/{command}.schema.json)"]
        lines += [_json_keys(kind) for kind in kinds if "properties" in kind]
        if objects := schema.get("$defs"):
            lines.append('??? note "Objects in this document"')
            for name, kind in objects.items():
                lines.append(indent(f"{code(name)} {kind.get('description', '')}\n\n{_json_keys(kind)}", "    "))
    return _page(*lines)


def _json_keys(schema: dict[str, Any]) -> str:
    """The table of an object's own keys."""
    keys = {key: value for key, value in schema.get("properties", {}).items() if key not in _EVERY_DOCUMENT}
    rows = [(code(key), _json_type(value), value.get("description", "")) for key, value in keys.items()]
    return table(["key", "type", "meaning"], rows) if rows else ""


def _json_type(schema: dict[str, Any]) -> str:
    """A type of a schema in words."""
    if "$ref" in schema:
        return code(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_json_type(kind) for kind in schema["anyOf"]))
    if schema.get("enum") == [str(member) for member in FindingCode]:
        return "[code of a finding](findings.md)"
    if "const" in schema or "enum" in schema:
        return ", ".join(code(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"list of {_json_type(schema['items'])}"
    kind = schema.get("type", "any value")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


#: Path of each page below docs/, and the function that writes it.
PAGES: Final[dict[str, Callable[[], str]]] = {
    "reference/commands.md": commands,
    "reference/python.md": python_api,
    "reference/check-toml.md": check_toml,
    "reference/exit-codes.md": exit_codes,
    "reference/json.md": json_output,
    "reference/metadata.md": metadata,
}
