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
from ibnorm_export.findings.explanation import Explanation
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
SIZE: Schema = {"type": ["integer", "string"]}
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


def told(meaning: str, value: Schema) -> Schema:
    """A value, and what it means, in a phrase without a full stop."""
    return {**value, "description": f"{meaning}."}


def closed(about: str, properties: Mapping[str, Schema], optional: Sequence[str] = ()) -> Schema:
    """An object with these keys and no other; what every key means must be told."""
    if untold := [name for name, value in properties.items() if not value.get("description")]:
        raise ValueError(f"{about!r} does not tell what {', '.join(untold)} means")
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "description": about,
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


VERDICT: Schema = told("what it all comes to", {"enum": ["pass", "fail"]})
DECISION: Schema = told(
    "what the measurements lead to; they may be too few to tell", {"enum": [decision.value for decision in Decision]}
)
CODE: Schema = {"enum": [code.value for code in FindingCode]}
TENSOR = closed(
    "A tensor: a size is a number, or the name of a dynamic axis; null is unknown.",
    {
        "name": told("its name in the file", TEXT),
        "dtype": told("its element type, such as float32; null if it is not known", or_null(TEXT)),
        "shape": told("its sizes; null if not even their number is known", or_null(listed(SIZE))),
    },
)
NORM = closed(
    "A norm, with lambda and epsilon in canonical form and as shortest decimal numbers.",
    {
        "module": told("path of the norm in the model", TEXT),
        "op": told("type of its node", TEXT),
        "lambda": told("the canonical lambda", NUMBER),
        "epsilon": told("the canonical epsilon", NUMBER),
    },
)


class Definitions:
    """Schemas of dataclasses, each once, by the name of its class."""

    #: Keys that the JSON has in addition to the fields of a class.
    ADDED: typing.ClassVar[dict[str, dict[str, Schema]]] = {
        name: {"verdict": VERDICT} for name in ("StaticReport", "NumericReport", "ExpectedReport")
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
                if field.name in texts:
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


FILE = closed(
    "A file that the command read or wrote.",
    {
        "path": told("where it is, as it was given", TEXT),
        "size_bytes": told("its size", WHOLE),
        "sha256": told("the SHA-256 of its content, in hexadecimal digits", TEXT),
    },
)
ERROR = closed(
    "An error, with the exit code of the command.",
    {
        "kind": told("name of the error class in Python, or usage, system, memory or internal", TEXT),
        "message": told("the line on standard error", TEXT),
    },
)
SCHEMA_NUMBER = told("version of this schema", {"const": SCHEMA_VERSION})
EXIT_CODE = told("exit code of the command", WHOLE)
ENVELOPE: dict[str, Schema] = {
    "schema_version": SCHEMA_NUMBER,
    "command": told("the command", TEXT),
    "version": told("version of ibnorm-export; null if it is not installed", or_null(TEXT)),
    "date": told("when it ran", {"type": "string", "format": "date-time"}),
    "environment": told("machine and versions of packages, by name", by_name({})),
    "files": told("the files that the command read and wrote", listed(FILE)),
}


def contents(define: Definitions) -> dict[str, list[Schema]]:
    """The properties of every command's result; a command with several forms has several.

    Long, but a table: one entry for each command, and above it what several entries share.
    """
    identity = closed(
        "What one norm of the user's own code is.",
        {
            "class": told("name of its class", TEXT),
            "member": told("whether it is an IBNorm, or a norm that this package has", FLAG),
            "kind": told("what it computes, in words", TEXT),
            "lambda": told("the canonical lambda; null if it has none", or_null(NUMBER)),
            "epsilon": told("the canonical epsilon; null if it has none", or_null(NUMBER)),
            "grouping": told("which values share mean and variance, in words", TEXT),
            "features": told("number of its features", WHOLE),
            "residual": told(
                "what the formula leaves unexplained of its output, relative to it; null if none fits",
                or_null(NUMBER),
            ),
            "parameters": told("what each of its parameters and buffers is, by name", by_name({})),
            "config": told(
                "the same as in the ibnorm section of config.json; null if it is no member", or_null(ANYTHING)
            ),
            "difference": told("how it differs from the nearest member; empty if it is one", TEXT),
        },
    )
    define.found["NormIdentity"] = identity
    case = closed(
        "One item that was checked.",
        {
            "suite": told('"EXPORT", "EXPORT.BACKEND" or "EXPORT.BACKEND.layers"', TEXT),
            "name": told("what was checked", TEXT),
            "outcome": told("its outcome", {"enum": [o.value for o in Outcome]}),
            "code": told("code of the finding; null for a pass", or_null(CODE)),
            "message": told("the reason or the figures, in words", TEXT),
            "seconds": told("how long it took, in seconds", NUMBER),
            "figures": told("the figures, by name", by_name({})),
        },
    )
    parity = closed("A comparison of a file with its checkpoint.", {"verdict": VERDICT, **define.report(ParityReport)})
    define.found["Parity"] = parity
    code = told("code of the finding; null if nothing is wrong", or_null(CODE))
    evaluation = {"verdict": DECISION, "code": code, **define.report(EvaluationReport)}
    define.found["Evaluation"] = closed("An evaluation.", evaluation)
    bench = {"verdict": VERDICT, **define.report(BenchReport)}
    define.found["Bench"] = closed("A measurement.", bench)
    sweep = {"verdict": VERDICT, **define.report(SweepReport)}
    sweep["evaluation"] = told("accuracy of all files that pass verification", {"$ref": "#/$defs/Evaluation"})
    define.found["Sweep"] = closed("A sweep over forms of export.", sweep)
    explanation = {name: told(text.removesuffix("."), TEXT) for name, text in documented(Explanation).items()}
    imported_norm = closed(
        "A norm.",
        {
            "path": told("path of the norm in the model", TEXT),
            "reading": told("what it computes, in words", TEXT),
            "residual": told("relative error of this reading; null if it is stated, not measured", or_null(NUMBER)),
        },
    )
    parity_ref, identity_ref = {"$ref": "#/$defs/Parity"}, {"$ref": "#/$defs/NormIdentity"}
    engine = {
        "path": told("the engine", TEXT),
        "format": told("version of the description beside the engine", {}),
        **define.report(EngineDescription),
        "compute_capabilities": told("GPUs that the engine runs on, such as sm_89, or the runtime's default", {}),
        "profiles": told("optimisation profiles, in the engine's order", listed(ANYTHING)),
        "norms": told("what each norm became in the engine", listed(ANYTHING)),
    }
    return {
        "verify": [parity["properties"]],
        "bench": [bench, {"verdict": VERDICT, **define.report(GenerationReport)}],
        "compare": [
            {
                "verdict": DECISION,
                "decision": told("the same as verdict", DECISION),
                "code": code,
                "ratio": told("time of the second measurement over that of the first; below 1 is faster", NUMBER),
                "low": told("lower end of the ratio's 95% interval", NUMBER),
                "high": told("upper end of the ratio's 95% interval", NUMBER),
                "rounds": told("number of rounds that were compared", WHOLE),
                "budget": told("the largest ratio that passes", NUMBER),
                "resolution": told("relative excess over the budget that passes too", NUMBER),
                "rounds_needed": told("rounds that would decide; null if the decision is made", or_null(WHOLE)),
                "notes": told("remarks for the reader", listed(TEXT)),
            }
        ],
        "evaluate": [
            evaluation,
            sweep,
        ],
        "check": [
            {
                "verdict": VERDICT,
                "config": told("the file of what is checked", TEXT),
                "seconds": told("how long it took, in seconds", NUMBER),
                "summary": told("one row for each export on each backend", listed(define.of(SummaryRow))),
                "cases": told("every item that was checked", listed(case)),
                "parity": told("each comparison with the checkpoint, by EXPORT.BACKEND", by_name(parity_ref)),
                "evaluations": told("each evaluation, by its name", by_name({"$ref": "#/$defs/Evaluation"})),
                "exported": told("the file of each export, by its name", by_name(TEXT)),
                "written": told("the reports that were written", listed(TEXT)),
                "notes": told("remarks for the reader", listed(TEXT)),
            },
            {"path": told("the check.toml that `--init` wrote", TEXT)},
        ],
        "analyze": [define.report(AnalysisReport)],
        "inspect": [define.report(FileInspection), define.report(CheckpointInspection)],
        "identify": [
            identity["properties"],
            {
                "passed": told("whether there are norms, and all are members", FLAG),
                "norms": told("each norm of the checkpoint, by module path", by_name(identity_ref)),
                "stock": told("class of each norm of PyTorch, by module path; they stay as they are", by_name(TEXT)),
                "refused": told("why a module cannot be run as a norm, by module path", by_name(TEXT)),
            },
        ],
        "doctor": [define.report(Diagnosis, works=told("whether everything that is needed is there", FLAG))],
        "import": [
            {
                "path": told("the folder that was written", TEXT),
                "kind": told("which training code wrote it", {"enum": [kind.value for kind in ImportKind]}),
                "family": told("the architecture", TEXT),
                "norms": told("the norms", listed(imported_norm)),
                "tensors": told("where each tensor of the folder comes from, by its name", by_name(TEXT)),
                "notes": told("remarks for the reader", listed(TEXT)),
                "tokenizer": told("whether the folder has a tokenizer", FLAG),
            }
        ],
        "export": [
            {
                "path": told("the ONNX file", TEXT),
                "size_bytes": told("size of the file and its external data", WHOLE),
                "norms": told("number of IBNorms", WHOLE),
                "opset": told("version of ONNX's operators", WHOLE),
                "dtype": told("type of the file", TEXT),
                "inputs": told("its inputs", listed(TENSOR)),
                "outputs": told("its outputs", listed(TENSOR)),
                "notes": told("remarks about the checkpoint", listed(TEXT)),
                "warnings": told("what may be wrong with the checkpoint", listed(TEXT)),
                "metadata": told("what the file states about itself: see Metadata", ANYTHING),
            }
        ],
        "build-engine": [engine],
        "package": [
            {
                "path": told("the repository", TEXT),
                "models": told("how the norms run in each model of the repository, by its name", by_name({})),
                "start": told("the command that starts a server on it", TEXT),
            }
        ],
        "serve": [define.report(ReadyServer)],
        "generate": [
            {
                "backend": told("the runtime", TEXT),
                "prompt": told("the text that is continued", TEXT),
                **define.report(TextResult),
            }
        ],
        "demo": [
            {
                "verdict": VERDICT,
                "folder": told("the folder that was written", TEXT),
                "models": told("each model: its training, parity and latency", listed(ANYTHING)),
                "text": told("the text of the language model in fp32, by backend", ANYTHING),
                "sweeps": told("the forms of each model, compared", listed({"$ref": "#/$defs/Sweep"})),
                "report": told("the page with the results", TEXT),
            }
        ],
        "explain": [
            explanation,
            {"findings": told("all findings", listed(closed("An explanation.", explanation)))},
        ],
    }


def schemas() -> dict[str, Schema]:
    """Return the schema of every command by its name."""
    found = {}
    for command in contents(Definitions()):
        define = Definitions()
        forms = contents(define)[command]
        error = {"error": ERROR, "exit_code": EXIT_CODE, "schema_version": SCHEMA_NUMBER}
        own = {**ENVELOPE, "command": told("the command", {"const": command})}
        branches = [closed("The result.", {**own, **form}) for form in forms]
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
