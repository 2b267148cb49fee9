"""How a file is verified."""

from __future__ import annotations

import enum
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ibnorm_export.artifacts.tensors import DType
from ibnorm_export.choices import choice, whole_number
from ibnorm_export.errors import ModelFileError
from ibnorm_export.runtimes.runner import Backend, Endpoint, Kernels

__all__ = ["InputCoverage", "VerifyOptions"]


class InputCoverage(enum.StrEnum):
    """Which inputs a file is compared on."""

    FULL = "full"  # also the longest sequence, the last slot of a cache, a large batch and large values
    FAST = "fast"  # ordinary samples only


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify.

    Args:
        backend: what runs the file, a `Backend` or its name.
        samples: how many inputs to draw; they walk through the shapes that matter.
        seed: seed for the random inputs.
        static: whether to give the static verdict too.
        kernels: how the norms run if the backend has a choice.
        require_fused: whether a norm that does not run as a fused kernel is a finding.
        layers: whether to measure the error after every norm and block, too.
        endpoint: the model on a running server, for backend "triton".
        engine: an engine built from the file, for TensorRT; None builds one.
        expected: an .npz file of inputs and outputs that the training code saved, to which the checkpoint and the file
            are held.
        expected_dtype: the type that the training code computed in; None takes that of the saved outputs.
        coverage: FULL adds inputs for what ordinary samples leave out; see `draw_covering_inputs`.
        provider: an execution provider of the installed ONNX Runtime, for backend "ort-cpu".
        npm: the folder given to `npm install --prefix`, for "ort-web" and "ort-node"; None looks where Node does.
        stress: whether to add inputs that expose wrong arithmetic; see `draw_stress_inputs`.

    Raises:
        IBNormError: there is no such backend, kind of kernels or coverage.
        ModelFileError: `samples` is below 1.
    """

    backend: str = Backend.ORT_CPU
    samples: int = 4
    _: KW_ONLY
    seed: int = 0
    static: bool = True
    kernels: Kernels = Kernels.AUTO
    require_fused: bool = False
    layers: bool = False
    endpoint: Endpoint | None = None
    coverage: InputCoverage = InputCoverage.FULL
    stress: bool = False
    engine: Path | None = None
    provider: str | None = None
    npm: Path | None = None
    expected: Path | None = None
    expected_dtype: DType | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", choice(Backend, self.backend, name="backend"))
        object.__setattr__(self, "kernels", choice(Kernels, self.kernels, name="kernels"))
        object.__setattr__(self, "coverage", choice(InputCoverage, self.coverage, name="coverage"))
        if self.expected_dtype is not None:
            object.__setattr__(self, "expected_dtype", DType.of(self.expected_dtype, error=ModelFileError))
        for name, least in (("samples", 1), ("seed", 0)):
            number = whole_number(getattr(self, name), name=name, least=least, error=ModelFileError)
            object.__setattr__(self, name, number)
