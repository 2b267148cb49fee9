"""torch.export, and the translation of the IBNorm operators that it records into ONNX nodes."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import onnx.defs
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

import ibnorm_export.op.torch_op  # noqa: F401 - registers the operators that are translated here
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.errors import CheckpointError, ExportError
from ibnorm_export.op.spec import DOMAIN, OP_VERSION, Compression
from ibnorm_export.text_report import counted

__all__ = ["ENTRY_PREFIX", "trace"]

#: Prefix of every name in the traced graph: the attribute of `LoadedModel.entry()` that holds the model.
ENTRY_PREFIX: Final = "checkpoint."

#: The newest opset that torch.onnx writes itself. It gives newer ones to a converter that does not know Attention.
_NEWEST_TRACED: Final = 25


def _onnx_operator(op_type: str, *, inputs: tuple[str, ...]) -> Op:
    """The ONNX operator `op_type` of this package's domain, for nodes with these inputs."""
    kinds = OpSchema.AttrType
    outputs = ("Y", "sum") if "skip" in inputs else ("Y",)
    schema = OpSchema(
        op_type,
        DOMAIN,
        OP_VERSION,
        inputs=[OpSchema.FormalParameter(name, "T") for name in inputs],
        outputs=[OpSchema.FormalParameter(name, "T") for name in outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            OpSchema.Attribute("lambd", kinds.FLOAT),
            OpSchema.Attribute("epsilon", kinds.FLOAT),
            OpSchema.Attribute("axis", kinds.INT),
            OpSchema.Attribute("plugin_namespace", kinds.STRING),
        ],
    )
    return Op(Opset(DOMAIN, OP_VERSION), op_type, op_schema=schema)


def _translation(op_type: str) -> Callable[..., Any]:
    """The function that turns one call of a norm into one node."""
    op = _onnx_operator(op_type, inputs=("X", "scale", "bias"))

    def translate(x: Any, weight: Any, bias: Any, lambd: float, epsilon: float) -> Any:
        return op(x, weight, bias, lambd=lambd, epsilon=epsilon, axis=-1, plugin_namespace="")

    return translate


def _skip_translation(op_type: str) -> Callable[..., Any]:
    """Like `_translation`, for a norm that adds a residual first."""
    op = _onnx_operator(op_type, inputs=("X", "skip", "scale", "bias"))

    def translate(x: Any, skip: Any, weight: Any, bias: Any, lambd: float, epsilon: float) -> Any:
        return op(x, skip, weight, bias, lambd=lambd, epsilon=epsilon, axis=-1, plugin_namespace="")

    return translate


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation of each operator that this package registers with PyTorch."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for compression in Compression:
        table[getattr(torch.ops.ibnorm, compression.op_type).default] = _translation(compression.op_type)
        table[getattr(torch.ops.ibnorm, compression.skip_op_type).default] = _skip_translation(compression.skip_op_type)
    return table


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's messages about optional packages and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def trace(model: LoadedModel, opset: int) -> ir.Model:
    """Record `model` as an ONNX graph whose norms are nodes of this package's domain.

    Args:
        model: its module is traced in the type of its parameters.
        opset: version of ONNX's default domain.

    Returns:
        The graph, its inputs and outputs named as `model` declares; all other names are PyTorch's.

    Raises:
        ExportError: torch.export cannot trace the model, or it does not return the declared number of tensors.
    """
    dynamic_axes = tuple({i: n for i, n in enumerate(s.shape) if isinstance(n, str)} for s in model.inputs)
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                model.entry(model.module),
                model.example(),
                dynamo=True,
                optimize=False,
                opset_version=min(opset, _NEWEST_TRACED),
                custom_translation_table=_translations(),
                dynamic_shapes={"tensors": dynamic_axes},
                input_names=[s.name for s in model.inputs],
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        cause = _root_cause(error)
        if isinstance(cause, CheckpointError):  # raised by `model.call`, with a clearer message
            raise cause from error
        first_line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ExportError(
            f"torch.export cannot trace {model.source}: {first_line}. The model must run without Python branches on "
            f"tensor values, for inputs {[s.name for s in model.inputs]}"
        ) from error
    assert program is not None
    _declare_opset(program.model, opset)
    _name_outputs(program.model.graph, model)
    return program.model


def _declare_opset(built: ir.Model, opset: int) -> None:
    """Let the model state a newer opset than it was traced in, which its operators must define in the same way."""
    traced = built.opset_imports[""]
    if traced == opset:
        return
    operators = {node.op_type for node in ir.traversal.RecursiveGraphIterator(built.graph) if node.domain == ""}
    changed = [
        name
        for name in sorted(operators)
        if onnx.defs.get_schema(name, opset).since_version != onnx.defs.get_schema(name, traced).since_version
    ]
    if changed:
        raise ExportError(
            f"opset is {opset}, which defines {', '.join(changed)} otherwise than opset {traced}; export with --opset "
            f"{traced}"
        )
    built.opset_imports[""] = opset


def _name_outputs(graph: ir.Graph, model: LoadedModel) -> None:
    """Name the outputs as declared; one that is also an input, a weight or another output becomes a copy of it."""
    if len(graph.outputs) != len(model.outputs):
        raise ExportError(
            f"{model.source} returns {counted(len(graph.outputs), 'tensor')} but declares "
            f"{counted(len(model.outputs), 'output name')} ({', '.join(model.outputs)}); give each tensor one name"
        )
    seen: set[ir.Value] = set()
    for position, (value, name) in enumerate(zip(list(graph.outputs), model.outputs, strict=True)):
        output = value
        if value in seen or value.producer() is None:
            node = ir.node("Identity", [value], name=f"{name}/identity")
            graph.append(node)
            output = node.outputs[0]
            output.shape, output.type = value.shape, value.type
            graph.outputs[position] = output
        seen.add(output)
        output.name = name
