"""What to measure and how: the options of `bench`."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.axes import axis_sizes
from ibnorm_export.choices import choice, real_number, whole_number, whole_numbers
from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.runtimes.runner import Backend, Kernels
from ibnorm_export.usable_cores import usable_cores

__all__ = [
    "BACKEND_CANDIDATES",
    "TORCH_CANDIDATES",
    "TRTEXEC",
    "BenchOptions",
    "Difference",
    "GenerationOptions",
    "TableFormat",
    "Timing",
]

#: The ways to run a checkpoint in PyTorch, as candidates of a benchmark.
TORCH_CANDIDATES: Final = ("torch", "torch.compile")

#: Backends that run the same file as other candidates; Triton is left out: it needs the address of a server.
BACKEND_CANDIDATES: Final = tuple(backend for backend in Backend if backend is not Backend.TRITON)


class TableFormat(enum.StrEnum):
    """The form of a table."""

    MD = "md"
    """Markdown."""
    LATEX = "latex"
    """A tabular environment with the rules of booktabs."""
    CSV = "csv"
    """Comma-separated values, with every digit."""


class Difference(enum.StrEnum):
    """What keeps two baselines from being compared."""

    INPUTS = "inputs"
    """Names or sizes of the inputs."""
    BACKEND = "backend"
    """What ran the model."""
    THREADS = "threads"
    """Number of threads."""
    PRECISION = "precision"
    """Types of activations and weights."""
    KERNELS = "kernels"
    """How the norms ran."""
    PROCESSOR = "processor"
    """The processor of the machine."""
    RUNTIME = "runtime"
    """Version of the runtime."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How the timing loop runs.

    Args:
        repeats: timed passes in one turn.
        warmup_ms: time that each candidate runs before the first round, in ms.
        min_ms: rounds continue until the timed passes of every candidate add up to this time, in ms.
        max_variation: the report warns of a candidate whose passes vary more than this (standard deviation over mean).
        rest_ms: pause before a turn, in ms. The threads of ONNX Runtime and OpenMP keep spinning after a pass, and
            slow the next candidate by up to 30% on two cores. Candidates that share one thread pool, or that run on a
            GPU, need no pause and get none.
    """

    repeats: int = 3
    warmup_ms: float = 500.0
    _: KW_ONLY
    min_ms: float = 0.0
    max_variation: float = math.inf
    rest_ms: float = 150.0

    def __post_init__(self) -> None:
        whole_number(self.repeats, name="repeats", least=1)
        for name in ("warmup_ms", "min_ms", "rest_ms"):
            real_number(getattr(self, name), name=name, least=0.0)
        real_number(self.max_variation, name="max_variation", above=0.0, finite=False)


#: The defaults of trtexec: 200 ms of warm-up, 3 s of measurement, and a warning above 1%.
#: Source: `trtexec --help` of TensorRT 10 (--warmUp, --duration) and its warning "GPU compute time is unstable".
TRTEXEC: Final = Timing(warmup_ms=200.0, min_ms=3000.0, max_variation=0.01)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What to measure of a model that generates text.

    Args:
        prompts: lengths of the prompts, in tokens.
        batches: numbers of rows; all rows of a batch have the same prompt length.
        steps: timed tokens in one turn of decoding.
    """

    prompts: tuple[int, ...] = (128, 512)
    batches: tuple[int, ...] = (1,)
    steps: int = 8

    def __post_init__(self) -> None:
        for name in ("prompts", "batches"):
            object.__setattr__(self, name, whole_numbers(getattr(self, name), name=name, least=1))
        object.__setattr__(self, "steps", whole_number(self.steps, name="steps", least=1))


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure. The fields are independent of each other and mirror the options of the command.

    Args:
        backend: a `Backend`, or its name. With "ort-cpu", a folder for onnxruntime-genai is measured in that runtime.
        kernels: how the norms run if the backend has a choice.
        sizes: sizes of the dynamic axes by name. Without an entry, batch is 1, and sequence is 128 or the number of
            positions of the model if that is smaller.
        threads: number of threads of each candidate; None means the physical cores that this process may use.
        rounds: number of turns of each candidate; 34 of them have the 100 passes that a 99th percentile needs.
        seed: seed of the random inputs.
        engine: a TensorRT engine that was built from the file; None builds one.
        provider: an execution provider of the installed ONNX Runtime, for backend "ort-cpu".
        npm: the folder given to `npm install --prefix`, for "ort-web" and "ort-node"; None looks where Node does.
        require_fused: the report fails unless every norm ran as a fused kernel.
        timing: see `Timing`; None means `TRTEXEC` for TensorRT, and the defaults for other backends.
        generation: what to measure of a model that generates text.
        loading: number of fresh processes that load the file, with prepacked weights and as many without, for backend
            "ort-cpu"; 0 does not measure loading.
    """

    backend: str = Backend.ORT_CPU
    kernels: Kernels = Kernels.AUTO
    _: KW_ONLY
    sizes: Mapping[str, int] = field(default_factory=dict)
    threads: int | None = None
    rounds: int = 34
    seed: int = 0
    engine: Path | None = None
    provider: str | None = None
    npm: Path | None = None
    require_fused: bool = False
    timing: Timing | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    loading: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", choice(Backend, self.backend, name="backend"))
        object.__setattr__(self, "kernels", choice(Kernels, self.kernels, name="kernels"))
        for name, least in (("rounds", 1), ("seed", 0), ("loading", 0)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name=name, least=least))
        if self.threads is not None:
            hint = ", or None for the cores that this process may use"
            object.__setattr__(self, "threads", whole_number(self.threads, name="threads", least=1, hint=hint))
        if not isinstance(self.sizes, Mapping):
            raise IBNormError(f"sizes is {quoted(self.sizes)}; it must hold numbers by name of the axis")
        sizes = {str(axis): whole_number(size, name=f"size of {axis}", least=0) for axis, size in self.sizes.items()}
        object.__setattr__(self, "sizes", axis_sizes(sizes))
        if self.engine is not None:
            object.__setattr__(self, "engine", Path(self.engine))
        if self.npm is not None:
            object.__setattr__(self, "npm", Path(self.npm))

    @property
    def thread_count(self) -> int:
        """Threads of every candidate."""
        return self.threads or usable_cores()

    @property
    def loop(self) -> Timing:
        """The timing loop for the backend."""
        if self.timing is not None:
            return self.timing
        return TRTEXEC if self.backend in (Backend.TENSORRT, Backend.TENSORRT_RTX) else Timing()
