"""Write ibnorm_export/schemas: the JSON Schema of what every command prints with --json, from its report's types."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ibnorm_export import EvaluationReport, ParityReport, ReadyServer
from ibnorm_export.analysis.report import AnalysisReport, NormAnalysis
from ibnorm_export.benchmark.report import BenchReport, GenerationReport
from ibnorm_export.benchmark.statistics import Decision
from ibnorm_export.doctor import Diagnosis
from ibnorm_export.evaluation.sweep_report import SweepReport
from ibnorm_export.findings.code import FindingCode
from ibnorm_export.gate.case import Outcome
from ibnorm_export.gate.summary import SummaryRow
from ibnorm_export.generation.text_model import TextResult
from ibnorm_export.inspection import CheckpointInspection, FileInspection
from ibnorm_export.json_text import SCHEMA_VERSION
from ibnorm_export.models.importers.report import ImportKind
from ibnorm_export.runtimes.tensorrt.description import EngineDescription

FOLDER = Path(__file__).resolve().parent.parent / "ibnorm_export" / "schemas"

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}
#: JSON has no NaN and no infinity: they are texts.
NUMBER: Schema = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}


def listed(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def or_null(value: Schema) -> Schema:
    """A value that may be unknown."""
    return {"anyOf": [value, {"type": "null"}]}


def by_name(values: Schema) -> Schema:
    """An object whose keys are names."""
    return {"type": "object", "additionalProperties": values}


def closed(about: str, properties: Mapping[str, Schema], optional: Sequence[str] = ()) -> Schema:
    """An object with these keys and no other."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "description": about,
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


PASS_OR_FAIL: Schema = {"enum": ["pass", "fail"]}
DECISION: Schema = {"enum": [decision.value for decision in Decision]}
CODE: Schema = {"enum": [code.value for code in FindingCode]}
TENSOR = closed(
    "A tensor: a size is a number, or the name of a dynamic axis; null is unknown.",
    {"name": TEXT, "dtype": or_null(TEXT), "shape": or_null(listed({"type": ["integer", "string"]}))},
)
NORM = closed(
    "A norm, with lambda and epsilon in canonical form and as shortest decimal numbers.",
    {"module": TEXT, "op": TEXT, "lambda": NUMBER, "epsilon": NUMBER},
)


class Definitions:
    """Schemas of dataclasses, each once, by the name of its class."""

    #: Keys that the JSON has in addition to the fields of a class.
    ADDED: typing.ClassVar[dict[str, dict[str, Schema]]] = {
        name: {"verdict": PASS_OR_FAIL} for name in ("StaticReport", "NumericReport", "ExpectedReport")
    }
    #: Keys that have another name than the field, and fields that have another form.
    RENAMED: typing.ClassVar[dict[str, dict[str, str]]] = {
        NormAnalysis.__name__: {"lambd": "lambda"},
        EvaluationReport.__name__: {"files": "written"},
        SweepReport.__name__: {"files": "swept"},
    }
    OTHER: typing.ClassVar[dict[tuple[str, str], Schema]] = {
        ("BenchReport", "inputs"): listed(TENSOR),
        ("FileInspection", "norms"): listed(NORM),
        ("CheckpointInspection", "norms"): listed(NORM),
    }
    DROPPED: typing.ClassVar[set[tuple[str, str]]] = {("BenchReport", "input_types")}

    def __init__(self) -> None:
        self.found: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """The schema of a type."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self._reference(kind)
        if origin in (typing.Union, types.UnionType):
            return {"anyOf": [self.of(argument) for argument in arguments]}
        if origin is tuple and arguments[-1] is not Ellipsis:
            parts = [self.of(argument) for argument in arguments]
            return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
        if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
            return listed(self.of(arguments[0]))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return by_name(self.of(arguments[1]))
        if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
            return {"enum": [member.value for member in kind]}
        plain: dict[Any, Schema] = {
            str: TEXT,
            int: WHOLE,
            float: NUMBER,
            bool: FLAG,
            type(None): {"type": "null"},
            Path: TEXT,
            Any: {},
            object: {},
        }
        return plain[kind]

    def _reference(self, kind: type) -> Schema:
        name = kind.__name__
        if name not in self.found:
            self.found[name] = {}  # a class may hold itself
            hints = typing.get_type_hints(kind)
            texts = documented(kind)
            properties = {}
            for field in dataclasses.fields(kind):
                if (name, field.name) in self.DROPPED:
                    continue
                other = self.OTHER.get((name, field.name))
                schema = dict(self.of(hints[field.name]) if other is None else other)
                if field.name in texts and "$ref" not in schema:
                    schema["description"] = texts[field.name]
                properties[self.RENAMED.get(name, {}).get(field.name, field.name)] = schema
            self.found[name] = closed(summary(kind), {**self.ADDED.get(name, {}), **properties})
        return {"$ref": f"#/$defs/{name}"}

    def report(self, kind: type, **added: Schema) -> Schema:
        """The properties of a report at the top of a document."""
        self._reference(kind)
        top = self.found[kind.__name__]
        return {**added, **top["properties"]}


def summary(kind: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def documented(kind: type) -> dict[str, str]:
    """What a docstring says of each field."""
    _, _, about = (inspect.getdoc(kind) or "").partition("Args:\n")
    found = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", about, re.MULTILINE):
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


FILE = closed("A file that the command read or wrote.", {"path": TEXT, "size_bytes": WHOLE, "sha256": TEXT})
ERROR = closed("An error, with the exit code of the command.", {"kind": TEXT, "message": TEXT})
ENVELOPE: dict[str, Schema] = {
    "schema_version": {"const": SCHEMA_VERSION},
    "command": TEXT,
    "version": or_null(TEXT),
    "date": {"type": "string", "format": "date-time"},
    "environment": by_name({}),
    "files": listed(FILE),
}


def contents(define: Definitions) -> dict[str, list[Schema]]:
    """The properties of every command's result; a command with several forms has several.

    Long, but a table: one entry for each command, and above it what several entries share.
    """
    identity = closed(
        "What one norm of the user's own code is.",
        {
            "class": TEXT,
            "member": FLAG,
            "kind": TEXT,
            "lambda": or_null(NUMBER),
            "epsilon": or_null(NUMBER),
            "grouping": TEXT,
            "features": WHOLE,
            "residual": or_null(NUMBER),
            "parameters": by_name({}),
            "config": or_null(ANYTHING),
            "difference": TEXT,
        },
    )
    define.found["NormIdentity"] = identity
    case = closed(
        "One item that was checked.",
        {
            "suite": TEXT,
            "name": TEXT,
            "outcome": {"enum": [o.value for o in Outcome]},
            "code": or_null(CODE),
            "message": TEXT,
            "seconds": NUMBER,
            "figures": by_name({}),
        },
    )
    parity = closed(
        "A comparison of a file with its checkpoint.", {"verdict": PASS_OR_FAIL, **define.report(ParityReport)}
    )
    define.found["Parity"] = parity
    evaluation = {"verdict": DECISION, "code": or_null(CODE), **define.report(EvaluationReport)}
    define.found["Evaluation"] = closed("An evaluation.", evaluation)
    bench = {"verdict": PASS_OR_FAIL, **define.report(BenchReport)}
    define.found["Bench"] = closed("A measurement.", bench)
    sweep = {"verdict": TEXT, **define.report(SweepReport), "evaluation": {"$ref": "#/$defs/Evaluation"}}
    define.found["Sweep"] = closed("A sweep over forms of export.", sweep)
    explanation = dict.fromkeys(("code", "title", "meaning", "importance", "remedy", "example"), TEXT)
    parity_ref, identity_ref = {"$ref": "#/$defs/Parity"}, {"$ref": "#/$defs/NormIdentity"}
    export = {"path": TEXT, "size_bytes": WHOLE, "norms": WHOLE, "opset": WHOLE, "dtype": TEXT}
    export |= {"inputs": listed(TENSOR), "outputs": listed(TENSOR), "notes": listed(TEXT), "warnings": listed(TEXT)}
    engine = {"path": TEXT, "format": {}, **define.report(EngineDescription)}
    engine |= {"compute_capabilities": {}, "profiles": listed(ANYTHING), "norms": listed(ANYTHING)}
    return {
        "verify": [parity["properties"]],
        "bench": [bench, {"verdict": PASS_OR_FAIL, **define.report(GenerationReport)}],
        "compare": [
            {
                "verdict": DECISION,
                "decision": DECISION,
                "code": or_null(CODE),
                "ratio": NUMBER,
                "low": NUMBER,
                "high": NUMBER,
                "rounds": WHOLE,
                "budget": NUMBER,
                "resolution": NUMBER,
                "rounds_needed": or_null(WHOLE),
                "notes": listed(TEXT),
            }
        ],
        "evaluate": [
            evaluation,
            sweep,
        ],
        "check": [
            {
                "verdict": PASS_OR_FAIL,
                "config": TEXT,
                "seconds": NUMBER,
                "summary": listed(define.of(SummaryRow)),
                "cases": listed(case),
                "parity": by_name(parity_ref),
                "evaluations": by_name({"$ref": "#/$defs/Evaluation"}),
                "exported": by_name(TEXT),
                "written": listed(TEXT),
                "notes": listed(TEXT),
            },
            {"path": TEXT},
        ],
        "analyze": [define.report(AnalysisReport)],
        "inspect": [define.report(FileInspection), define.report(CheckpointInspection)],
        "identify": [
            identity["properties"],
            {"passed": FLAG, "norms": by_name(identity_ref), "stock": by_name(TEXT), "refused": by_name(TEXT)},
        ],
        "doctor": [define.report(Diagnosis, works=FLAG)],
        "import": [
            {
                "path": TEXT,
                "kind": {"enum": [kind.value for kind in ImportKind]},
                "family": TEXT,
                "norms": listed(closed("A norm.", {"path": TEXT, "reading": TEXT, "residual": or_null(NUMBER)})),
                "tensors": by_name(TEXT),
                "notes": listed(TEXT),
                "tokenizer": FLAG,
            }
        ],
        "export": [{**export, "metadata": ANYTHING}],
        "build-engine": [engine],
        "package": [{"path": TEXT, "models": by_name({}), "start": TEXT}],
        "serve": [define.report(ReadyServer)],
        "generate": [{"backend": TEXT, "prompt": TEXT, **define.report(TextResult)}],
        "demo": [
            {
                "verdict": PASS_OR_FAIL,
                "folder": TEXT,
                "models": listed(ANYTHING),
                "text": ANYTHING,
                "sweeps": listed({"$ref": "#/$defs/Sweep"}),
                "report": TEXT,
            }
        ],
        "explain": [explanation, {"findings": listed(closed("An explanation.", explanation))}],
    }


def schemas() -> dict[str, Schema]:
    """Return the schema of every command by its name."""
    found = {}
    for command in contents(Definitions()):
        define = Definitions()
        forms = contents(define)[command]
        error = {"error": ERROR, "exit_code": WHOLE, "schema_version": {"const": SCHEMA_VERSION}}
        branches = [closed("The result.", {**ENVELOPE, "command": {"const": command}, **form}) for form in forms]
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"ibnorm-export {command} --json",
            "anyOf": [*branches, closed("No result.", error)],
        }
        used: set[str] = set()
        _collect(schema, define.found, used)
        found[command] = {**schema, "$defs": {name: define.found[name] for name in sorted(used)}}
    return found


def _collect(value: Any, definitions: Mapping[str, Schema], used: set[str]) -> None:
    """Add the names of all definitions that a schema refers to."""
    if isinstance(value, dict):
        name = str(value.get("$ref", "")).rpartition("/")[2]
        if name and name not in used:
            used.add(name)
            _collect(definitions[name], definitions, used)
        for item in value.values():
            _collect(item, definitions, used)
    elif isinstance(value, list):
        for item in value:
            _collect(item, definitions, used)


def text_of(schema: Schema) -> str:
    """A schema as its file holds it."""
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for command, schema in schemas().items():
        (FOLDER / f"{command}.schema.json").write_text(text_of(schema), encoding="utf-8")
