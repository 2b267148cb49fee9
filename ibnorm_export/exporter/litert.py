"""The format of LiteRT (TensorFlow Lite): model.tflite, with fixed shapes, converted by onnx2tf.

onnx2tf needs TensorFlow, and versions of NumPy and ONNX that this package does not use: it runs as a command from its
own environment. LiteRT itself is a package of 20 MB.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.runtime_versions import RuntimeName
from ibnorm_export.artifacts.tensors import Arrays, DType
from ibnorm_export.errors import BackendUnavailable, ExportError, shortened
from ibnorm_export.exporter.converted_folder import Converter
from ibnorm_export.optional_packages import import_package

__all__ = ["LITERT"]

_FILE: Final = "model.tflite"
_COMMAND: Final = "onnx2tf"
_MISSING: Final = (
    "--target litert needs the command onnx2tf, which is not on PATH. It needs TensorFlow, so install it into its "
    "own environment (pipx install onnx2tf), and export again"
)

#: What onnx2tf writes: float32, and the same with weights in float16, which LiteRT widens to float32 as it loads them.
_WRITTEN: Final = {DType.FP32: "*_float32.tflite", DType.FP16: "*_float16.tflite"}

#: LiteRT has no Erf, which exact GELU needs: onnx2tf writes the formula 7.1.26 of Abramowitz and Stegun, whose absolute
#: error is 1.5e-7. The quiet mode is named because the other prints every node.
_OPTIONS: Final = ("--not_use_onnxsim", "--non_verbose", "--copy_onnx_input_output_names_to_tflite")
_FORMULAS: Final = ("--replace_to_pseudo_operators", "Erf")


def _runner(interpreter: Any, exported: ExportedModel) -> Callable[[Arrays], Arrays]:
    """Return a function that runs the converted model; inputs and outputs have the names of the ONNX file."""
    signature = interpreter.get_signature_runner()
    types = {name: detail["dtype"] for name, detail in signature.get_input_details().items()}

    def run(arrays: Arrays) -> Arrays:
        feeds = {name: np.ascontiguousarray(arrays[name].astype(dtype, copy=False)) for name, dtype in types.items()}
        results = signature(**feeds)
        return {tensor.name: results[tensor.name] for tensor in exported.outputs}

    return run


def _convert(exported: ExportedModel, folder: Path, dtype: DType) -> Callable[[Arrays], Arrays]:
    command = shutil.which(_COMMAND)
    if command is None:
        raise BackendUnavailable(_MISSING)
    litert = import_package("ai_edge_litert.interpreter", extra="litert", purpose="--target litert")
    names = [tensor.name for tensor in exported.inputs]
    with tempfile.TemporaryDirectory() as work:
        where = ["-i", str(exported.path), "-o", work, "--keep_shape_absolutely_input_names", *names]
        done = subprocess.run(
            [command, *where, *_OPTIONS, *_FORMULAS], capture_output=True, text=True, check=False, cwd=work
        )
        written = next(Path(work).glob(_WRITTEN[dtype]), None)
        if written is None:
            lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
            raise ExportError(f"onnx2tf cannot convert the model: {shortened(lines[-1])}")
        shutil.copyfile(written, folder / _FILE)
    # Without the delegate that LiteRT adds by default, XNNPACK: it is less exact (1e-5 on a small LLaMA).
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = litert.Interpreter(str(folder / _FILE), experimental_op_resolver_type=plain)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"LiteRT cannot read the converted model: {shortened(str(error))}") from error
    return _runner(interpreter, exported)


LITERT: Final = Converter(RuntimeName.LITERT, "LiteRT", files=(_FILE,), convert=_convert, rounds_to=(DType.FP16,))
