"""The compression function g: coefficients match their derivation, errors match the comments of the header."""

from __future__ import annotations

import importlib.util
import re
import sys

import numpy as np
import pytest

from ibnorm_export.op.spec import Compression
from tests.support.cuda_emulator import ROOT, Emulator

HEADER = ROOT / "custom_ops" / "include" / "ibnorm" / "compress.h"


def test_coefficients_come_from_the_derivation() -> None:
    pytest.importorskip("mpmath", reason="mpmath derives the polynomials; install mpmath")
    spec = importlib.util.spec_from_file_location(
        "derive_compress", ROOT / "custom_ops" / "tools" / "derive_compress.py"
    )
    assert spec is not None
    assert spec.loader is not None
    derivation = importlib.util.module_from_spec(spec)
    sys.modules["derive_compress"] = derivation
    spec.loader.exec_module(derivation)
    text = HEADER.read_text()
    for fit in derivation.FITS:
        coefficients, error = derivation.derive(fit)
        stated = re.search(
            rf"// {fit.name}: relative error (\S+)\n.*?polynomial\([^,]+,(.*?)\)[,;]", text, flags=re.DOTALL
        )
        assert stated, f"{fit.name} is not in {HEADER.name}"
        written = [float(np.float32(k.strip().rstrip("F)"))) for k in stated.group(2).split(",")]
        assert written == coefficients, f"{fit.name}: run custom_ops/tools/derive_compress.py"
        assert float(stated.group(1)) == pytest.approx(error, rel=0.05)


def _spread(low: float, high: float, count: int = 400_000) -> np.ndarray:
    magnitudes = np.exp(np.linspace(np.log(low), np.log(high), count)).astype(np.float32)
    return np.concatenate([magnitudes, -magnitudes, np.zeros(1, np.float32)])


# The bounds for float32 are those of compress.h, in ulp. Half types need 2^-17 of the value, which leaves 99% of the
# results with the same rounding.
@pytest.mark.parametrize("injection", [0, 1, 2])
def test_float32_logarithm(emulator: Emulator, injection: int) -> None:
    t = _spread(1e-42, 8e37)
    exact = np.sign(t.astype(np.float64)) * np.log1p(np.abs(t.astype(np.float64)))
    error = np.abs(emulator.compress(t, Compression.LOGARITHMIC, False, injection) - exact)
    assert (error / np.spacing(np.abs(exact).astype(np.float32))).max() < 1.2


@pytest.mark.parametrize(("injection", "bound"), [(0, 2.0), (1, 5.0), (2, 5.0)])
def test_float32_tanh(emulator: Emulator, injection: int, bound: float) -> None:
    t = _spread(1e-42, 1e38)
    exact = np.tanh(t.astype(np.float64))
    error = np.abs(emulator.compress(t, Compression.TANH, False, injection) - exact)
    assert (error / np.spacing(np.abs(exact).astype(np.float32))).max() < bound


@pytest.mark.parametrize("injection", [0, 1, 2])
def test_half_logarithm(emulator: Emulator, injection: int) -> None:
    t = _spread(1e-30, 1e30)
    exact = np.sign(t.astype(np.float64)) * np.log1p(np.abs(t.astype(np.float64))) / np.log(2.0)
    got = emulator.compress(t, Compression.LOGARITHMIC, True, injection)
    assert (np.abs(got - exact) / np.maximum(np.abs(exact), 1e-300)).max() < 2.0**-17


@pytest.mark.parametrize("injection", [0, 1, 2])
def test_half_tanh(emulator: Emulator, injection: int) -> None:
    t = _spread(1e-30, 1e30)
    exact = np.tanh(t.astype(np.float64) * np.log(2.0) / 2.0)  # the argument is 2 log2(e) t
    got = emulator.compress(t, Compression.TANH, True, injection)
    assert (np.abs(got - exact) / np.maximum(np.abs(exact), 1e-300)).max() < 2.0**-17


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("compression", [Compression.LOGARITHMIC, Compression.TANH])
def test_not_a_number_stays_one(emulator: Emulator, compression: Compression, half: bool) -> None:
    bits = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0x7F800001], np.uint32)
    assert np.isnan(emulator.compress(bits.view(np.float32), compression, half)).all()
    if compression is Compression.LOGARITHMIC:
        infinite = np.array([np.inf, -np.inf], np.float32)
        assert not np.isfinite(emulator.compress(infinite, compression, half)).any()
