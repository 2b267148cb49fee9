"""The definition: conventions, legal values, layer rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibnorm_export import Compression, Convention, IBNormSpec, NormConfig
from ibnorm_export.errors import SpecError
from ibnorm_export.op import reference
from ibnorm_export.op.spec import SCHEMA, Grouping, NormKind

G = {"S": lambda r: r, "L": np.log1p, "T": np.tanh}
F = {
    "divide": lambda g, r, lam: g(r / lam),
    "unit_slope": lambda g, r, lam: lam * g(r / lam),
    "multiply": lambda g, r, lam: g(lam * r) / lam,
    "outer": lambda g, r, lam: g(r) / lam,
}


def paper(x: np.ndarray, kind: str, lam: float, epsilon: float, convention: str) -> np.ndarray:
    """s(x) = mu + sign(x - mu) f(|x - mu|), standardised, as the paper writes it."""
    mu = x.mean(-1, keepdims=True)
    s = mu + np.sign(x - mu) * F[convention](G[kind], np.abs(x - mu), lam)
    return (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + epsilon)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from("SLT"),
    convention=st.sampled_from([c.value for c in Convention]),
    lam=st.floats(0.25, 16.0),
    epsilon=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]),
    seed=st.integers(0, 99),
)
def test_every_convention_matches_the_formula_of_the_paper(
    kind: str, convention: str, lam: float, epsilon: float, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 17)) * 2.0
    spec = IBNormSpec.from_convention(kind, lam, epsilon=epsilon, convention=convention)
    np.testing.assert_allclose(
        reference.ibnorm(x, None, bias=None, spec=spec), paper(x, kind, lam, epsilon, convention), rtol=1e-9, atol=1e-11
    )


def test_conventions_differ() -> None:
    specs = {IBNormSpec.from_convention("L", 4.0, epsilon=1e-2, convention=c) for c in Convention}
    assert len(specs) == 4


@pytest.mark.parametrize("lam", [0, -1.0, float("nan"), float("inf"), 1e-60, 1e60, "4", True, None, 10**400])
def test_illegal_lambda(lam: object) -> None:
    for convention in Convention:
        with pytest.raises(SpecError, match="lambda"):
            IBNormSpec.from_convention("L", lam, epsilon=1e-5, convention=convention)  # type: ignore[arg-type]


@pytest.mark.parametrize("epsilon", [-1e-9, float("nan"), float("inf"), 1e60, "0", None])
def test_illegal_epsilon(epsilon: object) -> None:
    with pytest.raises(SpecError, match="epsilon"):
        IBNormSpec("L", 4.0, epsilon=epsilon)  # type: ignore[arg-type]


def test_an_error_names_value_and_legal_set() -> None:
    with pytest.raises(SpecError, match=r"'X'.*'S', 'L', 'T'"):
        IBNormSpec("X")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"'sideways'.*'divide'"):
        IBNormSpec.from_convention("L", 4.0, epsilon=1e-5, convention="sideways")
    with pytest.raises(SpecError, match="axis"):
        IBNormSpec(Compression.TANH, axis=-2)


SECTION = {"compression": "L", "lambda": 4.0, "epsilon": 1e-5, "convention": "divide"}


@pytest.mark.parametrize("missing", list(SECTION))
def test_an_error_names_the_missing_key(missing: str) -> None:
    with pytest.raises(SpecError, match=f"ibnorm.{missing} is missing"):
        NormConfig.from_config({k: v for k, v in SECTION.items() if k != missing})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lamda": 3.0}, "lamda"),
        ({"bias": "yes"}, "bias"),
        ({"grouping": "diagonal"}, "diagonal"),
        ({"layers": {}}, "layers"),
        ({"layers": [{"norm": "ibnorm"}]}, "match"),
        ({"layers": [{"match": "*", "norm": "groupnorm"}]}, "groupnorm"),
        ({"layers": [{"match": "*", "lambda": -1}]}, "lambda"),
    ],
)
def test_illegal_sections(change: dict[str, object], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        NormConfig.from_config({**SECTION, **change})
    with pytest.raises(SpecError, match="object"):
        NormConfig.from_config([])


def test_layer_rules_inherit_and_the_last_match_applies() -> None:
    config = NormConfig.from_config(
        {
            **SECTION,
            "convention": "multiply",
            "layers": [
                {"match": "layers.*", "lambda": 0.5},
                {"match": "layers.1.*", "norm": "layernorm"},
                {"match": "layers.2.*", "compression": "T", "bias": False},
            ],
        }
    )
    assert config.at("final") == (NormKind.IBNORM, config.default)
    assert config.default.lambd == 0.25
    assert config.at("layers.0.a")[1].lambd == 2.0
    assert config.at("layers.1.a")[0] is NormKind.LAYERNORM
    kind, spec = config.at("layers.2.a")
    assert (kind, spec.compression, spec.bias, spec.lambd) == (NormKind.IBNORM, Compression.TANH, False, 0.25)


def test_a_section_reads_back() -> None:
    config = NormConfig.from_config({**SECTION, "bias": False, "layers": [{"match": "a.*", "lambda": 2.0}]})
    assert NormConfig.from_config(config.to_config()) == config


def test_a_node_has_all_attributes_in_float32() -> None:
    attributes = IBNormSpec("L", 0.1, epsilon=1e-5).attributes()
    assert set(attributes) == set(SCHEMA["attributes"])
    assert attributes["lambd"] == float(np.float32(0.1))
    assert attributes["axis"] == -1
    assert attributes["plugin_namespace"] == ""


def test_grouping_axes_may_name_an_axis() -> None:
    assert IBNormSpec("S", grouping=Grouping.AXES, axis=-3).axis == -3


def test_the_epsilon_of_a_stock_norm_is_as_stated() -> None:
    """Only an IBNorm has a lambda, so only its epsilon depends on the convention."""
    section = {
        "compression": "L",
        "lambda": 2.0,
        "epsilon": 1e-5,
        "convention": "multiply",
        "layers": [{"match": "*.ln_f", "norm": "layernorm"}, {"match": "*.ln_1", "epsilon": 1e-3}],
    }
    config = NormConfig.from_config(section)
    assert config.at("h.0.ln_f")[1].epsilon == 1e-5
    assert config.at("h.0.ln_1")[1].epsilon == pytest.approx(4e-3)
    assert NormConfig.from_config(config.to_config()).at("h.0.ln_f")[1].epsilon == 1e-5
