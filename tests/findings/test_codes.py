"""Every finding has a code, every code an explanation, and no code is ever used for something else."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from ibnorm_export import FindingCode, IBNormError, explain
from ibnorm_export.findings.code import RETIRED
from ibnorm_export.findings.explanation import EXPLANATIONS

ROOT = Path(__file__).resolve().parents[2]

#: What each code has meant since it was given. Add to this list; change or remove nothing: reports, scripts and
#: searches refer to the codes. A code that is given up goes into RETIRED, and stays here.
GIVEN = {
    "IBN101": "NORM_COUNT",
    "IBN102": "NORM_UNKNOWN",
    "IBN103": "NORM_DIFFERS",
    "IBN104": "NORM_ORDER",
    "IBN111": "FUNCTION_MISSING",
    "IBN112": "FUNCTION_DIFFERS",
    "IBN113": "FUNCTION_TWICE",
    "IBN121": "WEIGHT_DIFFERS",
    "IBN122": "WEIGHT_MIXED",
    "IBN123": "WEIGHT_MISSING",
    "IBN124": "CONSTANT_UNKNOWN",
    "IBN125": "CONSTANT_UNREADABLE",
    "IBN126": "CONSTANT_TWICE",
    "IBN131": "NUMBER_UNKNOWN",
    "IBN132": "WINDOW_UNKNOWN",
    "IBN133": "POSITION_UNKNOWN",
    "IBN134": "BRANCHES",
    "IBN135": "DROPOUT",
    "IBN136": "RANDOM_NUMBERS",
    "IBN137": "OPERATOR_UNKNOWN",
    "IBN138": "SIZES_DECIDE",
    "IBN141": "OUTPUT_FLOAT64",
    "IBN142": "NODE_PRECISION",
    "IBN143": "TYPES_UNSOUND",
    "IBN144": "INPUT_USE",
    "IBN145": "CONVERSION",
    "IBN146": "FILE_ORDER",
    "IBN147": "OPSET",
    "IBN148": "INPUT_TYPE",
    "IBN149": "DECLARATION",
    "IBN151": "METADATA_CLAIM",
    "IBN152": "METADATA_TWICE",
    "IBN153": "METADATA_NORM",
    "IBN154": "METADATA_ENTRY",
    "IBN161": "FILE_EXTRA",
    "IBN162": "FILE_MISSING",
    "IBN163": "FILE_DIFFERS",
    "IBN164": "FILE_UNREADABLE",
    "IBN165": "MANIFEST_WRONG",
    "IBN166": "FILE_CHANGED",
    "IBN167": "LIBRARY_UNLISTED",
    "IBN168": "LIBRARY_DIFFERENT",
    "IBN201": "OUTPUT_ERROR",
    "IBN202": "DTYPE_UNFIT",
    "IBN203": "NOT_FINITE",
    "IBN204": "OUTPUT_SHAPE",
    "IBN205": "SAMPLE_REFUSED",
    "IBN206": "MASKED_ROWS",
    "IBN207": "FILE_REFUSED",
    "IBN208": "RUNTIME_FAULT",
    "IBN211": "ERROR_SOURCE",
    "IBN212": "FIRST_LAYER",
    "IBN221": "DECODING_ERROR",
    "IBN222": "DECODING_REFUSED",
    "IBN223": "RESUME_DIFFERS",
    "IBN231": "PREDICTIONS_DIFFER",
    "IBN241": "UNROUNDED_REFUSED",
    "IBN251": "MAPPING_NORM",
    "IBN252": "MAPPING_OUTPUTS",
    "IBN261": "EXPECTED_UNFIT",
    "IBN262": "EXPECTED_FILE",
    "IBN263": "EXPECTED_CHECKPOINT",
    "IBN264": "EXPECTED_REFUSED",
    "IBN271": "NOT_FUSED",
    "IBN301": "STEP_FAILED",
    "IBN302": "BACKEND_MISSING",
    "IBN303": "ABOVE_MAX_ERROR",
    "IBN304": "NOTHING_COMPARED",
    "IBN305": "NOT_RUN",
    "IBN311": "TOO_SLOW",
    "IBN312": "SPEED_UNDECIDED",
    "IBN313": "CONDITIONS_DIFFER",
    "IBN321": "ACCURACY_LOST",
    "IBN322": "ACCURACY_UNDECIDED",
    "IBN501": "NO_PYTORCH",
    "IBN502": "NO_ONNXRUNTIME",
    "IBN503": "TWO_ONNXRUNTIMES",
    "IBN504": "OLD_ONNXRUNTIME",
    "IBN505": "NO_FUSED_KERNELS",
    "IBN506": "NO_OPTIONAL_PACKAGE",
    "IBN507": "NO_NODE_PACKAGE",
    "IBN508": "NO_TRITON",
    "IBN509": "NO_COMPILER",
    "IBN510": "NO_GPU",
    "IBN511": "NO_TENSORRT",
    "IBN512": "NO_TENSORRT_PLUGIN",
    "IBN601": "CHECKPOINT_NOTE",
    "IBN602": "CHECKPOINT_WARNING",
}


def test_codes_keep_their_meaning() -> None:
    present = {code.value: code.name for code in FindingCode}
    assert len(present) == len(FindingCode), "a code is there twice"
    assert not present.keys() & RETIRED, "a retired code is used again"
    assert {code: name for code, name in GIVEN.items() if code not in RETIRED} == present


def test_every_code_is_explained_in_the_order_of_the_codes() -> None:
    assert set(EXPLANATIONS) == set(FindingCode)
    assert list(EXPLANATIONS) == sorted(FindingCode)
    titles = [explanation.title for explanation in EXPLANATIONS.values()]
    assert len(set(titles)) == len(titles)
    for explanation in EXPLANATIONS.values():
        assert not explanation.title.endswith(".")
        for text in (explanation.meaning, explanation.importance, explanation.remedy):
            assert len(text.split()) > 2
            assert "  " not in text
        assert explanation.meaning.endswith(".")
        assert explanation.importance.endswith(".")
        assert explanation.example


def test_every_code_is_used() -> None:
    """A code that nothing gives is an explanation of nothing."""
    sources = "".join(
        file.read_text(encoding="utf-8")
        for file in (ROOT / "ibnorm_export").rglob("*.py")
        if file.parent.name != "findings"
    )
    assert [code.name for code in FindingCode if f"FindingCode.{code.name}" not in sources] == []


def test_no_finding_is_without_a_code() -> None:
    """`Finding` demands one; a `Case` may be a pass, so every place that builds another outcome names a code."""
    for file in (ROOT / "ibnorm_export").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            keywords = {keyword.arg for keyword in node.keywords}
            if node.func.id == "Finding":
                assert "code" in keywords, f"{file.name}:{node.lineno}"
            if node.func.id == "Case" and not _passes(node):
                assert "code" in keywords, f"{file.name}:{node.lineno}"
            if node.func.id == "Check" and _is_false(node):
                assert "code" in keywords, f"{file.name}:{node.lineno}"


def _passes(call: ast.Call) -> bool:
    return any(k.arg == "outcome" and ast.unparse(k.value) == "Outcome.PASS" for k in call.keywords)


def _is_false(call: ast.Call) -> bool:
    return len(call.args) > 1 and ast.unparse(call.args[1]) == "False"


def test_explain() -> None:
    found = explain("ibn103")
    assert found.code is FindingCode.NORM_DIFFERS
    assert str(found).startswith("IBN103: A norm has another type")
    for part in ("What it means: ", "Why it matters: ", "What to do: ", "Example: "):
        assert part in str(found)
    assert list(found.to_dict()) == ["code", "title", "meaning", "importance", "remedy", "example"]


def test_an_unknown_code_names_the_nearest() -> None:
    with pytest.raises(IBNormError, match=r"no finding 'IBN1030'; the nearest are .*IBN103"):
        explain("IBN1030")
    with pytest.raises(IBNormError, match=r"no finding 'IBN999'; the nearest are IBN509, IBN149, and"):
        explain("IBN999")


def test_the_page_is_written_from_the_registry() -> None:
    path = ROOT / "scripts" / "write_findings_page.py"
    specification = importlib.util.spec_from_file_location("write_findings_page", path)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/write_findings_page.py"
