"""The weights of a file under the names of the checkpoint: as they are, transposed, packed with others or quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.errors import ModelFileError
from ibnorm_export.graph.quantization import BLOCK_SIZES, dequantize, step_sizes, stored_bits

__all__ = ["QuantizedValues", "StoredWeight", "StoredWeights"]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in the file, and the tensors of the checkpoint that it consists of.

    Args:
        name: its name in the file.
        tensors: one, or several that were joined along the first axis.
        dtype: the dtype that the file must have it in.
        transposed: whether the file has it transposed.
        quantized: whether the file has it in blocks of few bits.
    """

    name: str
    tensors: tuple[Tensor, ...]
    _: KW_ONLY
    dtype: torch.dtype
    transposed: bool
    quantized: bool

    @property
    def tensor(self) -> Tensor:
        """The checkpoint's value, in the checkpoint's dtype and the file's shape."""
        whole = (self.tensors[0] if len(self.tensors) == 1 else torch.cat(self.tensors)).detach()
        return whole.T if self.transposed else whole


@dataclass(frozen=True, slots=True)
class QuantizedValues:
    """A quantised weight.

    Args:
        values: the weight after dequantisation.
        steps: for each value, the distance between the numbers that it may be rounded to.
    """

    values: NDArray[np.float32]
    steps: NDArray[np.float32]


class StoredWeights:
    """Reads the weights of one file.

    Args:
        exported: the file.
    """

    def __init__(self, exported: ExportedModel) -> None:
        self._file = exported

    def of(self, model: LoadedModel) -> Iterator[StoredWeight]:
        """Every weight of the checkpoint that the file has."""
        dtype = torch_dtype(self._file.dtype)
        state = model.module.state_dict(keep_vars=True)
        for name, tensor in {**dict(model.module.named_buffers()), **state}.items():
            # A buffer that no checkpoint saves keeps its own dtype in the file.
            expected = dtype if name in state else tensor.dtype
            for stored in (name, f"{name}.T"):
                yield from self._find(stored, (tensor,), dtype=expected, transposed=stored != name)
        for stored, names in self._file.metadata.packed.items():
            if names and all(name in state for name in names):
                tensors = tuple(state[name] for name in names)
                yield from self._find(stored, tensors, dtype=dtype, transposed=stored.endswith(".T"))

    def _find(
        self, name: str, tensors: tuple[Tensor, ...], *, dtype: torch.dtype, transposed: bool
    ) -> Iterator[StoredWeight]:
        plain = name in self._file.weights
        if plain or stored_bits(self._file, name) is not None:
            yield StoredWeight(name, tensors, dtype=dtype, transposed=transposed, quantized=not plain)

    def parts(self, weight: StoredWeight) -> tuple[str, ...]:
        """Names of the tensors that a quantised weight consists of."""
        bits = stored_bits(self._file, weight.name)
        return tuple(f"{weight.name}_{part}" for part in (f"Q{bits}", "scales", "zero_points"))

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._file.weights

    def read(self, name: str) -> NDArray[Any]:
        """The value of a weight that is not quantised.

        Raises:
            ModelFileError: its bytes do not have the declared shape and type.
        """
        return self._file.array(name)

    def read_quantized(self, weight: StoredWeight) -> QuantizedValues:
        """The value of a quantised weight.

        Raises:
            ModelFileError: what the metadata declares about it is wrong, or its tensors are missing or damaged.
        """
        declared, bits = self._file.metadata.quantization, stored_bits(self._file, weight.name)
        if declared is None:
            raise ModelFileError("is quantised, but the metadata of the file declares no quantisation")
        if bits is None or bits not in (declared.bits, declared.head_bits):
            raise ModelFileError(f"has {bits} bits per value; the metadata of the file declares {declared.bits}")
        size = declared.block_size
        if size not in BLOCK_SIZES:  # a very large block would have very large steps
            raise ModelFileError(f"has blocks of {size} values; a block must have one of {BLOCK_SIZES}")
        values = dequantize(self._file, weight.name)
        assert values is not None
        return QuantizedValues(values, step_sizes(weight.tensor.float().numpy(), bits, block_size=size))
