"""Run files in one runtime, by the interpreter of an environment that has it; imports nothing of this project.

python runtimes_worker.py RUNTIME FOLDER...: each folder has model.onnx, inputs.npz and expected.npz, whose arrays are
compared where `valid.npz` says so. One JSON object is printed when a folder is begun, and one when it is done.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, Any]


def largest_error(found: Arrays, expected: Arrays, valid: Arrays) -> float:
    """Largest error of any output, relative to its largest expected value; infinite where a value is not finite."""
    worst = 0.0
    for name, truth in expected.items():
        chosen = valid[name]
        values = np.asarray(found[name]).astype(np.float64)
        if values.shape != truth.shape:
            raise ValueError(f"output {name} has shape {values.shape}, not {truth.shape}")
        error = float(np.abs(values - truth)[chosen].max() / np.abs(truth[chosen]).max())
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def run_onnxruntime(model: Path, inputs: Arrays) -> Arrays:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(inputs)), strict=True))


def _outputs(model: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(str(model)).graph.output]


def _openvino(model: Path, inputs: Arrays, settings: dict[str, str]) -> Arrays:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    found = compiled(dict(enumerate(inputs.values())))
    return {name: found[index] for index, name in enumerate(_outputs(model))}


def run_openvino_default(model: Path, inputs: Arrays) -> Arrays:
    return _openvino(model, inputs, {})


def run_openvino(model: Path, inputs: Arrays) -> Arrays:
    return _openvino(model, inputs, {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})


def run_iree(model: Path, inputs: Arrays) -> Arrays:
    import subprocess

    import iree.compiler.tools
    import iree.runtime

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "model.mlir"
        tool = [sys.executable, "-m", "iree.compiler.tools.import_onnx"]
        done = subprocess.run([*tool, model, "-o", text], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        compiled = iree.compiler.tools.compile_file(
            str(text), target_backends=["llvm-cpu"], input_type="onnx", extra_args=["--iree-llvmcpu-target-cpu=host"]
        )
    config = iree.runtime.Config("local-task")
    module = iree.runtime.load_vm_flatbuffer(compiled, driver="local-task")
    del config
    (name,) = [key for key in module.vm_module.function_names if "$async" not in key and not key.startswith("__")]
    found = module[name](*inputs.values())
    found = found if isinstance(found, (tuple, list)) else (found,)
    return dict(zip(_outputs(model), [np.asarray(value.to_host()) for value in found], strict=True))


def run_litert(model: Path, inputs: Arrays) -> Arrays:
    import subprocess

    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with tempfile.TemporaryDirectory() as folder:
        options = ["-kat", *inputs, "-nuo", "-n", "-coion", "-rtpo", "Erf"]
        program = Path(sys.executable).with_name("onnx2tf")
        done = subprocess.run(
            [program, "-i", model, "-o", folder, *options], capture_output=True, text=True, cwd=folder
        )
        dtype = "float16" if model.parent.name.endswith("fp16") else "float32"
        written = next(Path(folder).glob(f"*_{dtype}.tflite"), None)
        if written is None:
            raise ValueError((done.stdout + done.stderr).strip().splitlines()[-1])
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES  # XNNPACK is less exact: 1e-5 on a small LLaMA
        run = Interpreter(str(written), experimental_op_resolver_type=plain).get_signature_runner()
        return dict(run(**inputs))


def run_tvm(model: Path, inputs: Arrays) -> Arrays:
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(onnx.load(str(model)), keep_params_in_input=False)
    module = relax.transform.DecomposeOpsForInference()(module)
    machine = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    found = machine["main"](*(tvm.runtime.tensor(array) for array in inputs.values()))
    names = _outputs(model)
    values = [found] if len(names) == 1 and hasattr(found, "numpy") else [found[i] for i in range(len(names))]
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def run_mnn(model: Path, inputs: Arrays) -> Arrays:
    import subprocess

    import MNN

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.mnn"
        command = [Path(sys.executable).with_name("mnnconvert"), "-f", "ONNX", "--modelFile", model, "--MNNModel", file]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder)
        if not file.is_file():
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise ValueError(next((line for line in lines if "rror" in line or "not support" in line), lines[-1]))
        names = _outputs(model)
        network = MNN.nn.load_module_from_file(str(file), list(inputs), names)
        found = network.forward([_mnn_tensor(array) for array in inputs.values()])
        return {name: np.array(value.read()) for name, value in zip(names, found, strict=True)}


def _mnn_tensor(array: Any) -> Any:
    import MNN

    kind, narrow = (MNN.expr.int, np.int32) if array.dtype == np.int64 else (MNN.expr.float, np.float32)
    return MNN.expr.const(np.ascontiguousarray(array.astype(narrow)), list(array.shape), MNN.expr.NCHW, kind)


def run_tract(model: Path, inputs: Arrays) -> Arrays:
    import tract

    runnable = tract.onnx().load(str(model)).into_model().into_runnable()
    found = runnable.run(list(inputs.values()))
    return {name: value.to_numpy() for name, value in zip(_outputs(model), found, strict=True)}


RUNTIMES: dict[str, Callable[[Path, Arrays], Arrays]] = {
    "onnxruntime": run_onnxruntime,
    "openvino": run_openvino,
    "openvino-default": run_openvino_default,
    "iree": run_iree,
    "litert": run_litert,
    "mnn": run_mnn,
    "tract": run_tract,
    "tvm": run_tvm,
}


def outcome(run: Callable[[Path, Arrays], Arrays], folder: Path) -> dict[str, Any]:
    """What a runtime makes of one folder: an error, or why it refuses the file."""
    inputs, expected, valid = (
        dict(np.load(folder / f"{name}.npz").items()) for name in ("inputs", "expected", "valid")
    )
    try:
        return {"error": largest_error(run(folder / "model.onnx", inputs), expected, valid)}
    except Exception as error:  # noqa: BLE001  # any runtime may raise anything, and that is what is recorded
        return {"refuses": reason(error)}


def reason(error: Exception) -> str:
    """The sentence of a runtime's message that says why, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines[: next((i for i, line in enumerate(lines) if line == "Stack backtrace:"), None)]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd", "Summary"))]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(told or lines or [type(error).__name__]))
    last = re.split(r"(?<=\w)\. (?=[A-Z])", text)[-1]
    return re.sub(r"/\S*/", "", last)[:200]


def main() -> None:
    runtime, *folders = sys.argv[1:]
    for name in folders:
        print(json.dumps({"begins": name}), flush=True)
        print(json.dumps({"folder": name, **outcome(RUNTIMES[runtime], Path(name))}), flush=True)


if __name__ == "__main__":
    main()
