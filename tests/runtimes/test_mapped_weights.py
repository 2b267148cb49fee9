"""Sessions of ONNX Runtime that hold no copy of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

SIZE, MATRICES = 1024, 24
WIDE_BYTES = MATRICES * SIZE * SIZE * 4


#: Prints by how much memory grows when a file is opened and run, with its weights mapped and without, and the outputs.
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from ibnorm_export.runtimes.ort import OrtRunner

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024

growth, sums = [], []
for maps_weights in (True, False):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS:")
    runner = OrtRunner(Path(sys.argv[1]), 1, maps_weights=maps_weights)
    sums.append(runner.run({"x": np.ones((2, int(sys.argv[2])), dtype=np.float32)})["y"].tolist())
    growth.append(resident("VmHWM:") - before)
print(json.dumps([*growth, *sums]))
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of products with bfloat16 matrices, which are cast to float32 first, as in a copy that rounds nothing."""
    rng = np.random.default_rng(0)
    value = x = ir.Value(name="x", shape=ir.Shape((2, SIZE)), type=ir.TensorType(ir.DataType.FLOAT))
    casts, products, weights = [], [], []
    for number in range(MATRICES):
        values = rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE)
        tensor = ir.tensor(values.astype(ml_dtypes.bfloat16), name=f"w{number}")
        weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        wide = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT.value})
        product = ir.node("MatMul", [value, wide.outputs[0]])
        casts.append(wide)
        products.append(product)
        weights.append(weight)
        value = product.outputs[0]
    value.name, value.type, value.shape = "y", x.type, x.shape
    nodes = [*casts, *products]
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="chain")
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    ir.save(ir.Model(graph, ir_version=10), path, external_data="chain.data")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_session_with_mapped_weights_holds_one_of_them_at_a_time_and_computes_the_same(chain: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(chain), str(SIZE)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mapped, plain, actual, expected = json.loads(printed)
    pages = WIDE_BYTES // 2  # those of the file
    assert plain > WIDE_BYTES, "the test would not see a copy"
    assert mapped < pages + 0.2 * WIDE_BYTES
    # Products of prepacked matrices may be summed in another order: SIZE steps of float32 in each of the products.
    np.testing.assert_allclose(actual, expected, atol=MATRICES * np.sqrt(SIZE) * 2.0**-23 * np.abs(expected).max())
