"""The library that CMake builds with IBNORM_CUDA=ON (`make native-cuda`), on a machine with or without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from ibnorm_export.op import native, reference
from ibnorm_export.op.spec import IBNormSpec

LIBRARY = Path(__file__).resolve().parents[3] / "build" / "native-cuda" / "libibnorm_ort.so"
pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="not built: run `make native-cuda`, which needs nvcc")


def test_has_both_providers() -> None:
    found = native.inspect(LIBRARY)
    assert found, found.problem
    assert set(found.providers) == {"cpu", "cuda"}


def test_needs_no_cuda_library() -> None:
    """cudart is linked statically and loads the driver at run time, which a machine without a GPU does not have."""
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed
    assert [name for name in needed if "cuda" in name or "nv" in name] == []


def test_exports_only_its_entry_points() -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in symbols.splitlines()} == {"RegisterCustomOps", "ibnorm_schema", "ibnorm_build"}


def test_a_cpu_session_runs_its_kernels() -> None:
    spec = IBNormSpec("L", 4.0, epsilon=1e-5)
    attributes = {"lambd": 4.0, "epsilon": 1e-5, "axis": -1, "plugin_namespace": ""}
    node = helper.make_node("IBNormL", ["x", "scale", "bias"], ["y"], domain="ai.ibnorm", **attributes)
    shapes = {"x": ["r", 64], "scale": [64], "bias": [64]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["r", 64])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.ibnorm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.standard_normal(s).astype(np.float32) for s in ((5, 64), 64, 64))
    (y,) = session.run(None, {"x": x, "scale": scale, "bias": bias})
    truth = reference.ibnorm(x, scale, bias=bias, spec=spec)
    assert np.linalg.norm(y - truth) <= 5e-7 * np.linalg.norm(truth)
