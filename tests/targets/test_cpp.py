"""`examples/cpp`: the program is built by its own CMakeLists.txt, and computes what PyTorch does in float64."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.op import native

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / ".cache" / "headers" / "onnxruntime"
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(CMAKE is None or COMPILER is None, reason="CMake or a C++ compiler is not installed"),
    pytest.mark.skipif(
        not (HEADERS / "onnxruntime_cxx_api.h").is_file(), reason="no headers: run python scripts/fetch_headers.py"
    ),
]

#: Relative error of a result in fp32: 16 roundings of 2**-24 add up in the deepest sum of the tiny model, and norms and
#: attention amplify them less than twice.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, linked with the library of the installed onnxruntime package."""
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the package has neither, a release has both
        (folder / name).symlink_to(library)
    where = [f"-DORT_INCLUDE_DIR={HEADERS}", f"-DORT_LIBRARY={folder / 'libonnxruntime.so'}"]
    for command in (["-S", ROOT / "examples" / "cpp", "-B", folder / "build", *where], ["--build", folder / "build"]):
        done = subprocess.run([str(CMAKE), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "classify"


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("fused", [False, True], ids=["functions", "fused"])
def test_it_classifies_as_pytorch_does(
    program: Path,
    pixels: NDArray[np.float32],
    exported_vit: ExportedModel,
    vit_checkpoint: Path,
    tmp_path: Path,
    fused: bool,
) -> None:
    pixels.tofile(tmp_path / "pixels.f32")
    done = run(program, exported_vit.path, tmp_path / "pixels.f32", *([native.ort_library()] if fused else []))
    assert done.returncode == 0, done.stderr
    *values, last = done.stdout.splitlines()
    with torch.no_grad():
        truth = models.load(vit_checkpoint).truth()(pixel_values=torch.from_numpy(pixels).double()).logits[0].numpy()
    assert len(values) == len(truth) == 10
    assert np.linalg.norm(np.array(values, dtype=np.float64) - truth) <= TOLERANCE * np.linalg.norm(truth)
    assert last == f"class {truth.argmax()}"


def test_the_library_runs_the_norms(
    program: Path, pixels: NDArray[np.float32], exported_vit: ExportedModel, tmp_path: Path
) -> None:
    """Without the functions, a file runs only where the library has registered the operators."""
    proto = onnx.load(exported_vit.path)
    del proto.functions[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    pixels.tofile(tmp_path / "pixels.f32")
    without = run(program, tmp_path / "bare.onnx", tmp_path / "pixels.f32")
    assert without.returncode == 1
    assert "ai.ibnorm" in without.stderr
    assert run(program, tmp_path / "bare.onnx", tmp_path / "pixels.f32", native.ort_library()).returncode == 0


def test_mistakes_are_explained(program: Path, exported_vit: ExportedModel, tmp_path: Path) -> None:
    (tmp_path / "short.f32").write_bytes(b"\0" * 8)
    assert run(program).returncode == 2
    short = run(program, exported_vit.path, tmp_path / "short.f32")
    assert (short.returncode, short.stderr) == (2, f"{tmp_path}/short.f32 has fewer than 64 floats\n")
    missing = run(program, tmp_path / "none.onnx", tmp_path / "short.f32")
    assert missing.returncode == 1
    assert "none.onnx" in missing.stderr
