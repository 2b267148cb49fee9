"""Run one tool on ONNX files, in its own process: `python tools_worker.py TOOL SOURCE TARGET ...`.

Prints one JSON object for each pair of files: {"error": ""} or what the tool raised. It does not import this
package, as a user of the tool would not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx


def _onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    model, checked = onnxsim.simplify(onnx.load(source))
    if not checked:
        raise RuntimeError("onnxsim's own comparison fails")
    onnx.save(model, target)


def _onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def _onnxoptimizer(source: Path, target: Path) -> None:
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source), onnxoptimizer.get_fuse_and_elimination_passes()), target)


def _onnxscript(source: Path, target: Path) -> None:
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(source)), target)


def _polygraphy(source: Path, target: Path) -> None:
    from polygraphy.backend.onnx import fold_constants

    onnx.save(fold_constants(onnx.load(source)), target)


def _version_converter(source: Path, target: Path) -> None:
    import onnx.version_converter

    onnx.save(onnx.version_converter.convert_version(onnx.load(source), 21), target)


def _compose(source: Path, target: Path) -> None:
    """Join the model with one that copies its output."""
    import onnx.compose

    model = onnx.load(source)
    output = model.graph.output[0]
    copy = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["in"], ["copied"])],
        "copy",
        [onnx.helper.make_value_info("in", output.type)],
        [onnx.helper.make_value_info("copied", output.type)],
    )
    imports = [onnx.helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
    second = onnx.helper.make_model(copy, opset_imports=imports, ir_version=model.ir_version)
    onnx.save(onnx.compose.merge_models(model, second, io_map=[(output.name, "in")]), target)


def _inliner(source: Path, target: Path) -> None:
    import onnx.inliner

    onnx.save(onnx.inliner.inline_local_functions(onnx.load(source)), target)


def _quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def _quant_pre_process(source: Path, target: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target))


def _transformers_optimizer(source: Path, target: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    kind = {"vit": "vit", "gpt2": "gpt2"}.get(source.stem.partition("-")[0], "bert")
    optimize_model(str(source), model_type=kind, num_heads=4, hidden_size=32).save_model_to_file(str(target))


def _ort_optimised(source: Path, target: Path) -> None:
    """The file that a session writes at level "basic", which is the same on every machine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _float16(source: Path, target: Path) -> None:
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _ort_float16(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxoptimizer": _onnxoptimizer,
    "onnxscript.optimizer": _onnxscript,
    "polygraphy fold_constants": _polygraphy,
    "onnx.version_converter": _version_converter,
    "onnx.compose": _compose,
    "onnx.inliner": _inliner,
    "onnxruntime quantize_dynamic": _quantize_dynamic,
    "onnxruntime quant_pre_process": _quant_pre_process,
    "onnxruntime transformers optimizer": _transformers_optimizer,
    "onnxruntime offline optimisation": _ort_optimised,
    "onnxconverter_common float16": _float16,
    "onnxruntime float16": _ort_float16,
}


def main(tool: str, *files: str) -> None:
    """Run a tool on pairs of files."""
    for source, target in zip(files[::2], files[1::2], strict=True):
        result: dict[str, Any] = {"error": ""}
        try:
            TOOLS[tool](Path(source), Path(target))
        except Exception as error:  # noqa: BLE001  # a tool may raise anything; that is what is recorded
            lines = str(error).strip().splitlines()
            result["error"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
        print(f"\nRESULT {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
