"""Remove each check of the static verdict in turn: a planted fault that it finds must then pass that verdict.

    python -m tests.verifier.faults.mutants [--record FILE] [--folder FOLDER]

The exit status is 0 if every fault is found by the whole verdict and passes without its check.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ibnorm_export.environment import environment
from ibnorm_export.errors import IBNormError
from ibnorm_export.verifier import folder
from ibnorm_export.verifier.checkpoint.coverage import measure_coverage
from ibnorm_export.verifier.checkpoint.samples import prepare_samples
from ibnorm_export.verifier.folder import with_folder
from ibnorm_export.verifier.options import VerifyOptions
from ibnorm_export.verifier.report import Finding
from ibnorm_export.verifier.static import constants
from ibnorm_export.verifier.static import format as static_format
from ibnorm_export.verifier.static import inlined as static_inlined
from ibnorm_export.verifier.static import inputs as static_inputs
from ibnorm_export.verifier.static import masks as static_masks
from ibnorm_export.verifier.static import norms as static_norms
from ibnorm_export.verifier.static import numbers as static_numbers
from ibnorm_export.verifier.static import operators as static_operators
from ibnorm_export.verifier.static import sizes as static_sizes
from ibnorm_export.verifier.static import verdict as static
from ibnorm_export.verifier.static import weights as static_weights
from ibnorm_export.verifier.static.dataflow import DataFlow
from ibnorm_export.verifier.static.verdict import check_static
from tests.verifier.faults.forms import form
from tests.verifier.faults.table import KINDS, plant

__all__ = ["MUTANTS", "Mutant", "findings"]


@dataclass(frozen=True)
class Mutant:
    """A check that is removed.

    Args:
        check: what is checked.
        owner: the module or class of the function.
        function: its name.
        result: what it returns instead.
        fault: the kind of fault that only this check finds by reading.
        form: the form that the fault is planted in.
    """

    check: str
    owner: Any
    function: str
    result: Any
    fault: str
    form: str


def _nothing(*args: Any, **kwargs: Any) -> tuple[()]:
    return ()


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class _Everything:
    """Contains whatever it is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


MUTANTS = (
    Mutant("attributes of norms", static_norms, "_attribute_problems", _nothing, "lambda x 1.01", "llama"),
    Mutant(
        "scales and biases of norms",
        static_norms,
        "_affine_problems",
        _nothing,
        "scales of two norms exchanged",
        "llama",
    ),
    Mutant(
        "order of norms", static_norms, "_order_problems", _nothing, "two norms exchanged with their weights", "llama"
    ),
    Mutant("number of norms", static, "check_norms", _nothing, "a norm has a second node", "llama"),
    Mutant(
        "inlined norms", static_inlined.InlinedNorms, "take", _always(True), "inlined: scales exchanged", "vit inlined"
    ),
    Mutant("bodies of functions", static, "check_functions", _nothing, "a body without Abs", "llama"),
    Mutant("types", static, "check_types", _nothing, "one fp16 weight is stored in fp32", "vit fp16"),
    Mutant("use of inputs", static, "check_inputs", _nothing, "heads of the cache reversed", "llama decoder"),
    Mutant("narrow integers", static_inputs, "_narrow_casts", _nothing, "positions in 8 bits", "llama decoder"),
    Mutant("metadata of norms", static, "_claim_problems", _nothing, "a norm's lambda is stated wrongly", "llama"),
    Mutant(
        "metadata of blocks",
        static,
        "_quantization_problems",
        _nothing,
        "the block size is stated wrongly",
        "llama int8",
    ),
    Mutant("values of weights", static_weights, "_compare_bits", _always(""), "the sign of one weight", "llama"),
    Mutant(
        "quantised values",
        static_weights,
        "_compare_quantized",
        _always(""),
        "a row of packed bytes reversed",
        "llama int8",
    ),
    Mutant("weights that nothing uses", static_weights, "_missing", _nothing, "a bias is left out", "gpt2"),
    Mutant(
        "constants that are not weights",
        constants.KnownConstants,
        "problem",
        _always(""),
        "tables of 64 rows",
        "llama genai",
    ),
    Mutant("numbers", static, "check_numbers_used", _nothing, "a residual branch x 1.02", "llama"),
    Mutant("inputs that are one number", static_numbers, "_input_numbers", _nothing, "a window of 150 tokens", "llama"),
    Mutant(
        "numbers that are attributes",
        static_numbers,
        "_attribute_numbers",
        _nothing,
        "scores are capped at 50",
        "llama",
    ),
    Mutant("positions", static_numbers, "_places", _nothing, "positions from 100 on", "llama"),
    Mutant(
        "windows",
        static_numbers._Numbers,
        "explains_window",
        _always(True),
        "attention within 150 tokens",
        "llama genai",
    ),
    Mutant("branches", static_numbers, "BRANCHES", frozenset(), "a scan that carries the row before", "vit"),
    Mutant("functions", static, "check_operators", _nothing, "a limit of eight times the first row's", "llama"),
    Mutant("sizes", static_sizes, "_compared_sizes", _nothing, "a batch that is split at a limit", "resnet"),
    Mutant("numbers of rows", static_sizes, "_moved_rows", _nothing, "row numbers that stop", "vit"),
    Mutant("masks", static, "check_masks", _nothing, "a hole of six masked tokens is closed", "llama"),
    Mutant(
        "statistics of a batch", static_numbers, "_trains", _always(False), "statistics of the batch", "resnet batch"
    ),
    Mutant(
        "limits of fused operators",
        static_numbers,
        "_activation_limits",
        _nothing,
        "the activation of a conv",
        "resnet",
    ),
    Mutant("declared sizes", static_format, "_declared_problems", _nothing, "a value is declared for one row", "llama"),
    Mutant("axes of outputs", static_format, "_returned_axes", _nothing, "the new cache is declared", "llama decoder"),
    Mutant("values stored twice", static_format, "_tensor_problems", _nothing, "a weight as bytes and", "vit"),
    Mutant("names given twice", static_format, "_repeated_names", _nothing, "an output is listed twice", "vit"),
    Mutant("parts of quantised weights", static_weights, "_part_problems", _nothing, "no zero points", "llama int8"),
    Mutant("slices of a batch", static_sizes, "_cut_rows", _nothing, "early rows negated by a slice", "llama"),
    Mutant(
        "how often a function is computed",
        static_operators,
        "_unknown_functions",
        _nothing,
        "one tangent more than the model has",
        "gpt2",
    ),
    Mutant("operators that choose", static_operators, "_STRUCTURE", {}, "rows that a condition keeps", "vit"),
    Mutant("conversions", static_operators, "_unknown_conversion", _nothing, "a branch through text", "llama"),
    Mutant("factors", static_operators, "check_factors", _nothing, "infinity above 2^18, by doubling", "vit"),
    Mutant("choices by data", static_operators, "_is_data", _always(False), "a value halved where its multiple", "vit"),
    Mutant("number of attentions", static_operators, "_more_attention", _nothing, "one attention more", "llama"),
    Mutant("truth values of masks", static_masks, "_MASKS", 10**6, "padding is ignored for one long", "llama"),
    Mutant("tables of numbers", DataFlow, "renumbers", _always(False), "ids from a table of ids", "gpt2"),
    Mutant("tables of sizes", static_sizes, "_looked_up_sizes", _nothing, "a shape from a table of 64", "vit"),
    Mutant("idle nodes", static_format, "_idle_problems", _nothing, "an idle table of 64 rows", "vit"),
    Mutant(
        "values of norms that are written out",
        static_operators,
        "_is_function",
        _always(False),
        "a branch through a tangent, beside written-out norms",
        "vit inlined",
    ),
    Mutant("types of other values", DataFlow, "converts_to", _always(0), "images' values through fp16", "vit bf16"),
    Mutant("stated target", static, "_entry_problems", _nothing, "a target that takes no", "llama decoder fp16"),
    Mutant("domains", static_operators, "_DOMAINS", _Everything(), "one number replaced by another", "vit"),
    Mutant("data of sizes", static_sizes, "_sizes_as_data", _nothing, "rows from 64 on are zero, by Pad", "llama"),
    Mutant("names of axes", static_format, "_axis_problems", _nothing, "the mask's axis is that", "llama decoder"),
    Mutant("types of inputs", static_format, "_type_problems", _nothing, "images in float64", "vit"),
    Mutant("format", static, "check_format", _nothing, "token ids of 32 bits", "gpt2"),
    Mutant("names of functions", static_format, "_function_problems", _nothing, "a local function called Tanh", "vit"),
    Mutant("order of nodes", static_format, "_order_problems", _nothing, "nodes out of order", "vit"),
    Mutant("half types", static_inputs, "_half_casts", _nothing, "a branch through the other half type", "vit bf16"),
    Mutant(
        "tokenizer and configuration", folder, "_companion_problems", _nothing, "tokens are exchanged", "llama decoder"
    ),
    Mutant("keys given twice", folder, "_repeated", _nothing, "a key twice in tokenizer.json", "llama decoder"),
    Mutant(
        "files for transformers.js",
        folder,
        "_web_problems",
        _nothing,
        "transformers.js: weights that are not there",
        "vit web",
    ),
    Mutant("further files", folder, "_OTHERS", (), "a list of words", "llama decoder"),
    Mutant("genai_config.json", folder, "_genai_problems", _nothing, "genai: another length", "llama genai"),
    Mutant("manifest", folder, "_manifest_problems", _nothing, "a truncated library", "llama genai"),
    Mutant("library", folder, "_library_problems", _nothing, "another library with its own hash", "llama genai"),
)


def findings(mutant: Mutant, forms: Path, *, removed: bool) -> tuple[Finding, ...]:
    """Findings of the static verdict in the file with the fault.

    Args:
        mutant: the check and the fault.
        forms: where right files are kept.
        removed: whether the check is removed.
    """
    kind = next(kind for kind in KINDS if kind.name.startswith(mutant.fault) and mutant.form in kind.forms)
    right = form(mutant.form, forms)
    with tempfile.TemporaryDirectory() as place:
        planted = plant(kind, right, Path(place))
        inputs = prepare_samples(planted, right.model, options=VerifyOptions(samples=1), given=None).inputs[0]
        coverage = measure_coverage(right.model, right.model.in_float64(), inputs=inputs)
        patched = mock.patch.object(mutant.owner, mutant.function, mutant.result)
        with patched if removed else mock.patch.object(sys, "argv", sys.argv):
            report = with_folder(check_static(planted, right.model, coverage=coverage), planted, model=right.model)
    return report.findings


def _judge(mutant: Mutant, forms: Path) -> dict[str, Any]:
    try:
        before, after = (findings(mutant, forms, removed=removed) for removed in (False, True))
    except IBNormError as error:
        return {"check": mutant.check, "caught": False, "why": str(error)}
    return {
        "check": mutant.check,
        "fault": mutant.fault,
        "form": mutant.form,
        "finding": str(before[0]) if before else "",
        "findings without the check": [str(finding) for finding in after],
        "caught": bool(before) and not after,
    }


def main() -> int:
    """Judge every mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="Write the results to this file.")
    parser.add_argument("--folder", type=Path, help="Keep right files here.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        forms = options.folder or Path(place)
        rows = []
        for mutant in MUTANTS:
            rows.append(_judge(mutant, forms))
            print("caught" if rows[-1]["caught"] else "MISSED", json.dumps(rows[-1]), flush=True)
    if options.record is not None:
        content = {"mutants": rows, "environment": environment()}
        options.record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["caught"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
