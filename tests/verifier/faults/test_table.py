"""A part of the tables that the suites planted_faults and false_alarms measure: some faults, and some right exports."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.verifier.faults.forms import FORMS
from tests.verifier.faults.mutants import MUTANTS, Mutant, findings
from tests.verifier.faults.right_exports import EXPORTS, FIRST_HOSTILE, HOSTILE, alarms, right_export
from tests.verifier.faults.table import KINDS, judge
from tests.verifier.faults.unusual_exports import UNUSUAL, unusual_alarms


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


#: A kind of each group, the form that it is planted in, and what finds it.
SOME: dict[str, tuple[str, set[str]]] = {
    "the sign of one weight": ("llama", {"static"}),
    "a bias is left out": ("vit bf16", {"static", "numeric"}),
    "statistics of another layer": ("resnet batch", {"static", "numeric"}),
    "cosines are zero from row 64": ("llama genai", {"static", "numeric"}),
    "tables of 64 rows": ("llama genai", {"static"}),
    "slots stop at 60": ("llama static", {"static", "numeric"}),
    "inlined: |d| > 200 clipped": ("vit inlined", {"static"}),
    "a window of 64 tokens": ("llama", {"numeric"}),
    "heads of the cache reversed": ("llama static", {"static", "numeric"}),
    "padding is ignored above 20 rows": ("llama", {"static", "numeric"}),
    "a token that is at its own position": ("llama", {"static"}),
    "images clipped at 65504": ("vit inlined", {"static"}),
    "softmax over another axis": ("vit bf16", {"numeric"}),
    "NaN above 64 rows": ("llama", {"static"}),
    "colours reversed": ("resnet batch", {"static", "numeric"}),
    "a residual branch x 1.02": ("vit bf16", {"numeric"}),
    "a branch plus its square with a cache and several tokens": ("llama genai bf16", {"numeric"}),
    "a branch through the other half type": ("vit bf16", {"static"}),
    "a limit of eight times the first row's largest": ("vit", {"static"}),
    "zeros for 64 times more rows than tokens": ("llama", {"static"}),
    "logits of rows from 64 on are zero": ("llama", {"static"}),
    "rows change places in large batches": ("resnet", {"static"}),
    "a wrong function before the right one": ("vit", {"static"}),
    "a local function called Tanh": ("vit", {"static"}),
    "an attribute that norms do not have": ("llama", {"static"}),
    "nodes out of order": ("vit", {"static"}),
    "outputs in another order": ("gpt2 decoder", {"static"}),
    "token ids of 32 bits": ("gpt2", {"static"}),
    "an output is declared narrower": ("vit", {"numeric"}),
    "version 99 of the norms": ("vit", {"static"}),
    "rows from 64 on are zero, by Concat": ("vit", {"static"}),
    "NaN above 256 rows, by a power": ("llama", {"static"}),
    "a cube over a square": ("resnet", {"static"}),
    "one tangent more than the model has": ("gpt2", {"static"}),
    "axes of the logits exchanged": ("llama", {"numeric"}),
    "both axes of the token ids are the batch": ("llama web", {"static"}),
    "transformers.js: data that is not there": ("llama web", {"folder"}),
    "images: another mean": ("vit web", {"folder"}),
    "another temperature": ("llama genai", set()),
    "rows of 37 tokens among 61, by a factor": ("llama", {"static"}),
    "row numbers that start again": ("vit", {"static"}),
    "the activation of a convolution is a limit": ("resnet", {"static"}),
    "a weight as bytes and as numbers": ("vit", {"static"}),
    "genai: a key twice": ("llama genai", {"folder"}),
    "zero becomes one, by a conversion": ("resnet", {"static"}),
    "a pattern of six, with a cache": ("gpt2 decoder", {"static"}),
    "doubled with the negative": ("llama decoder", {"static"}),
    "times 4 and over 4 around a convolution": ("resnet batch", {"static"}),
    "row numbers start again, by a conversion": ("llama", {"static"}),
    "positions lose digits in a large batch": ("llama", {"static"}),
    "an idle loop": ("resnet", {"static"}),
}


def test_there_are_120_kinds_with_different_names() -> None:
    assert len(KINDS) >= 120
    assert [name for name, count in Counter((k.group, k.name) for k in KINDS).items() if count > 1] == []
    assert {name for kind in KINDS for name in kind.forms} == set(FORMS)


def test_there_are_400_right_exports_and_60_are_hostile() -> None:
    cases = [right_export(number) for number in range(EXPORTS)]
    assert len(cases) == 400
    hostile = Counter(case.hostile for case in cases)
    assert 400 - hostile[""] == EXPORTS - FIRST_HOSTILE == 60
    assert set(hostile) == {"", *HOSTILE}
    assert {case.family for case in cases} == {"llama", "gpt2", "vit", "resnet"}


@pytest.mark.parametrize("name", list(SOME))
def test_a_fault_is_found(name: str, forms: Path) -> None:
    where, finders = SOME[name]
    kind = next(kind for kind in KINDS if kind.name.endswith(name))
    if where.startswith("llama genai"):
        pytest.importorskip("onnxruntime_genai", reason="its builder writes the file")
    outcome = judge(kind, where, forms)
    assert bool(outcome.found) == bool(finders), outcome
    assert finders <= set(outcome.found), outcome


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.check)
def test_without_its_check_a_fault_passes(mutant: Mutant, forms: Path) -> None:
    if mutant.form.startswith("llama genai"):
        pytest.importorskip("onnxruntime_genai", reason="its builder writes the file")
    assert findings(mutant, forms, removed=False)
    assert findings(mutant, forms, removed=True) == ()


@pytest.mark.parametrize("number", [2, 9, 11, 15, 341, 342, 347])
def test_a_right_export_passes(number: int, tmp_path: Path) -> None:
    found: Any = alarms(right_export(number), tmp_path)
    assert found[0] == (), right_export(number)


def test_there_are_40_unusual_exports_with_different_names() -> None:
    assert len(UNUSUAL) >= 40
    assert len({case.name for case in UNUSUAL}) == len(UNUSUAL)


@pytest.mark.parametrize(
    "name",
    [
        "code: cross-attention",  # a weight that is used in parts
        "code: convolutions",  # code that refuses short inputs
        "code: fixed sizes",  # code without a dynamic axis
        "code: time first",  # logits whose axes are in another order than those of the ids
        "modernbert, a mean over tokens",  # code that asks whether a mask has an effect, and sums it too
        "weights that are inputs with a default",
        "sigmoids of several nodes",
        "deberta-v2, relative positions",  # positions that are clamped, and gathered by
    ],
)
def test_an_unusual_export_passes(name: str, tmp_path: Path) -> None:
    case = next(case for case in UNUSUAL if case.name == name)
    assert unusual_alarms(case, tmp_path)[0] == ()
