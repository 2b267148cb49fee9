"""Weight-only quantisation by ONNX Runtime's MatMulNBits quantizer, and dequantisation for comparison."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import QuantizationEntry
from ibnorm_export.errors import BackendUnavailable, ExportError, ModelFileError, quoted

__all__ = [
    "BLOCK_SIZES",
    "Quantization",
    "dequantize",
    "preserved_logging",
    "quantize",
    "quantize_matrix",
    "step_sizes",
    "stored_bits",
]

#: Block sizes that the kernel of ONNX Runtime's CPU provider supports.
BLOCK_SIZES: Final = (16, 32, 64, 128, 256)

#: Lets the kernel round activations to int8 too, which makes it fast on a CPU.
_ACCURACY_LEVEL: Final = 4


@dataclass(frozen=True, slots=True)
class Quantization:
    """How matrices are stored. Norms and embeddings are not quantised.

    Args:
        bits: bits of each weight, 4 or 8.
        block_size: number of weights that share a scale and a zero point.
        head_bits: bits of each weight of the matrix that produces the logits, 4 or 8; None does not quantise it.

    Raises:
        ExportError: a value is not legal.
    """

    bits: int
    block_size: int = 32
    head_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.head_bits not in (4, 8, None):
            raise ExportError(f"bits is {self.bits} and head_bits is {self.head_bits}; they must be 4 or 8")
        if self.block_size not in BLOCK_SIZES:
            raise ExportError(f"block size is {self.block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}")

    def entry(self) -> QuantizationEntry:
        """What a file's metadata records about it."""
        method = "MatMulNBits, round to nearest, zero points"
        return QuantizationEntry(self.bits, self.block_size, head_bits=self.head_bits, method=method, norms="fp32")


@contextlib.contextmanager
def preserved_logging() -> Iterator[None]:
    """Silence the program's logging within the block, and restore it afterwards.

    The quantizer sets up logging for the whole program and then reports every node.
    """
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


def _pass(model: onnx.ModelProto, bits: int, *, block_size: int, exclude: set[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    worker = nbits.MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block_size,
        is_symmetric=False,
        accuracy_level=_ACCURACY_LEVEL,
        nodes_to_exclude=sorted(exclude),
        op_types_to_quantize=("MatMul",),
    )
    worker.process()
    quantized: onnx.ModelProto = worker.model.model
    return quantized


def _split_gemm(graph: onnx.GraphProto) -> None:
    """Replace every plain Gemm with MatMul and Add, the only form of a product that the quantizer accepts."""
    nodes = []
    for node in graph.node:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        if node.op_type != "Gemm" or {**plain, **values} != plain or len(node.input) != 3:
            nodes.append(node)
            continue
        a, b, bias = node.input
        name = node.name or node.output[0]
        product = onnx.helper.make_node("MatMul", [a, b], [f"{node.output[0]}/product"], name=f"{name}/product")
        total = onnx.helper.make_node("Add", [product.output[0], bias], list(node.output), name=name)
        for replacement in (product, total):
            replacement.metadata_props.extend(node.metadata_props)
        nodes += [product, total]
    del graph.node[:]
    graph.node.extend(nodes)


def _products(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The MatMul nodes of a graph and of the graphs in it."""
    for node in graph.node:
        if node.op_type == "MatMul":
            yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _products(inner)


def quantize(model: onnx.ModelProto, wanted: Quantization) -> onnx.ModelProto:
    """Return the model with its constant matrices quantised: those of two axes that its graph itself multiplies by.

    A matrix that the logits and other products share is stored as that of the logits.

    Args:
        model: the model; do not use it afterwards.
        wanted: how to store the matrices.

    Raises:
        ExportError: the model has no constant matrices.
        BackendUnavailable: onnxruntime is not installed.
    """
    _split_gemm(model.graph)
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    matmuls = [n for n in model.graph.node if n.op_type == "MatMul" and n.domain == "" and n.input[1] in matrices]
    of_logits = {n.input[1] for n in matmuls if "logits" in n.output}
    head = {n.name for n in matmuls if n.input[1] in of_logits}
    body = {n.name for n in matmuls} - head
    # ONNX Runtime also quantises constants of the shape (1, k, n), and those in the bodies of loops and branches.
    others = {n.name for n in _products(model.graph)} - head - body
    if not body or not head:
        raise ExportError("the model has no constant matrices between its input and its logits to quantise")
    # By output: the quantizer gives nodes other names, and their outputs the same.
    props = {node.output[0]: list(node.metadata_props) for node in model.graph.node if node.output}
    try:
        with preserved_logging():
            model = _pass(model, wanted.bits, block_size=wanted.block_size, exclude=head | others)
            if wanted.head_bits is not None:
                model = _pass(model, wanted.head_bits, block_size=wanted.block_size, exclude=others)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"quantisation needs the package {error.name}, which is not installed; pip install 'ibnorm-export[cpu]'"
        ) from error
    for node in model.graph.node:
        if not node.metadata_props and node.output:
            node.metadata_props.extend(props.get(node.output[0], []))
    return model


def quantize_matrix(weight: NDArray[Any], *, bits: int, block_size: int) -> dict[str, NDArray[Any]]:
    """Return the parts of a quantised matrix, by the ends of their names in a file.

    Args:
        weight: (k, n), in fp32 or fp16.
        bits: bits of each value.
        block_size: number of values along k in a block.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    config = nbits.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=False, bits=bits)
    quantizer = nbits.DefaultWeightOnlyQuantizer(config)
    # It reads the values in the order of memory, whatever the strides.
    packed, scales, zero_points = quantizer.qbits_block_quant(np.ascontiguousarray(weight))
    return {f"_Q{bits}": packed, "_scales": scales, "_zero_points": zero_points}


def _unpack(packed: NDArray[np.uint8], bits: int, *, count: int) -> NDArray[np.float32]:
    """(..., n) bytes -> (..., count) numbers. Of two 4-bit numbers in a byte, the lower half is the first."""
    if bits == 4:
        packed = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed[..., :count].astype(np.float32)


def stored_bits(exported: ExportedModel, name: str) -> int | None:
    """Bits of each value of the matrix `name` of a file; None if it is not quantised."""
    return next((bits for bits in (4, 8) if f"{name}_Q{bits}" in exported.weights), None)


def dequantize(exported: ExportedModel, name: str) -> NDArray[np.float32] | None:
    """Return the matrix `name` of a file, (k, n), in float32; None if it is not quantised.

    Raises:
        ModelFileError: a tensor that belongs to it is missing or has the wrong shape.
    """
    bits = stored_bits(exported, name)
    if bits is None:
        return None
    try:
        node = next(n for n in exported.proto.graph.node if f"{name}_Q{bits}" in n.input)
        rows = next(int(a.i) for a in node.attribute if a.name == "K")
        values, scales = exported.array(f"{name}_Q{bits}"), exported.array(f"{name}_scales").astype(np.float32)
        columns, blocks, _ = values.shape
        zeros = _unpack(exported.array(f"{name}_zero_points").reshape(columns, -1), bits, count=blocks)[..., None]
        numbers = _unpack(values, bits, count=values.shape[2] * (8 // bits))
        whole: NDArray[np.float32] = (numbers - zeros) * scales.reshape(columns, blocks, 1)
    except (StopIteration, KeyError, ValueError) as error:
        raise ModelFileError(
            f"{exported.path}: the quantised weight {quoted(name)} is damaged: {quoted(error)}"
        ) from error
    return whole.reshape(columns, -1)[:, :rows].T


def step_sizes(weight: NDArray[np.float32], bits: int, *, block_size: int) -> NDArray[np.float32]:
    """Return the distance between neighbouring numbers that each value of a weight can be rounded to.

    A block of `block_size` values along k has 2^bits numbers between its smallest and its largest value, including 0.
    Rounding to the nearest moves a value by up to half a step, or by one step if the zero point was rounded too.

    Args:
        weight: (k, n).
        bits: bits of each value.
        block_size: number of values in a block.

    Returns:
        (k, n).
    """
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // block_size) * block_size, columns), dtype=np.float32)
    padded[:rows] = weight
    blocks = padded.reshape(-1, block_size, columns)
    step = (blocks.max(1).clip(min=0) - blocks.min(1).clip(max=0)) / (2**bits - 1)
    return np.repeat(step, block_size, axis=0)[:rows]
