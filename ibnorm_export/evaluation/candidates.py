"""Exported files and checkpoints as candidates: one protocol over every runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.kv_cache import input_specs
from ibnorm_export.artifacts.metadata import Target, Task, Weights
from ibnorm_export.artifacts.onnx_file import GENAI_CONFIG_FILE, MODEL_FILE
from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.environment import version_of
from ibnorm_export.errors import IBNormError, ModelFileError, quoted
from ibnorm_export.evaluation.endpoint_candidate import EndpointCandidate
from ibnorm_export.evaluation.identity import hash_of, torch_identity
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.samples import Candidate, ModelFacts, TokenScores, Window
from ibnorm_export.evaluation.scoring import score_tokens
from ibnorm_export.files import sha256_of
from ibnorm_export.generation.decoder import Decoder
from ibnorm_export.generation.sessions import open_genai
from ibnorm_export.generation.text_model import TextModel, open_checkpoint, open_folder
from ibnorm_export.optional_packages import demand_package
from ibnorm_export.runtimes.registry import BACKENDS, check_backend, fused_library, open_runner
from ibnorm_export.runtimes.runner import Backend, Runner
from ibnorm_export.usable_cores import usable_cores

if TYPE_CHECKING:  # importing torch takes seconds, and exported files do not need it
    from ibnorm_export.artifacts.loaded_model import LoadedModel

__all__ = [
    "ModelCandidate",
    "check_backends",
    "exported_candidate",
    "genai_candidate",
    "open_candidate",
    "torch_candidate",
]

_LOGITS: Final = "logits"

#: The package whose version the answers of a backend depend on; others are part of the same one.
_PACKAGES: Final = {
    "ort-cpu": "onnxruntime",
    "ort-cuda": "onnxruntime-gpu",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
    "reference": "onnx",
}

#: By how much of their range later tokens may move logits: by rounding, in a type such as fp16.
_CAUSAL: Final = 0.01


class _TimedRunner:
    """Adds up the time that a runner takes; opens it when it is first needed."""

    def __init__(self, opener: Callable[[], Runner]) -> None:
        self._opener = opener
        self._runner: Runner | None = None
        self.seconds = 0.0
        self.name = ""

    def run(self, inputs: Arrays) -> Arrays:
        if self._runner is None:
            self._runner = self._opener()
            self.name = self._runner.name
        start = time.perf_counter()
        outputs = self._runner.run(inputs)
        self.seconds += time.perf_counter() - start
        return outputs


class ModelCandidate:
    """A model behind a runner of the registry.

    Args:
        name: name in the report.
        identity: hash of what determines its answers.
        facts: what is known about it.
        inputs: what it takes.
        opener: opens its runner; called when it is first asked.
        generator: opens it for the generation of text; called when it is first asked for some.
        threads: threads of its runtime, and of the scores after it; None is one for each usable core.
    """

    def __init__(
        self,
        name: str,
        *,
        identity: str,
        facts: ModelFacts,
        inputs: Sequence[InputSpec],
        opener: Callable[[], Runner],
        generator: Callable[[], TextModel],
        threads: int | None = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.facts = facts
        self._inputs = tuple(inputs)
        self._runner = _TimedRunner(opener)
        self._generator = generator
        self._threads = usable_cores() if threads is None else threads
        self._text_model: TextModel | None = None
        self._causal = False

    @property
    def seconds(self) -> float:
        """Time that its runtime has taken so far, in seconds."""
        return self._runner.seconds

    @property
    def text_model(self) -> TextModel:
        """The model with its tokenizer, for the generation of text.

        Raises:
            IBNormError: it cannot generate: it was exported without a cache, or runs on another backend.
        """
        if self._text_model is None:
            self._text_model = self._generator()
        return self._text_model

    def classify(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits (batch, classes) of images (batch, channels, height, width).

        Raises:
            ModelFileError: the model does not take one batch of images, or the runtime fails.
        """
        if len(self._inputs) != 1 or not self._inputs[0].floating or len(self._inputs[0].shape) != 4:
            shapes = {spec.name: spec.shape for spec in self._inputs}
            raise ModelFileError(f"{self.name} is not an image classifier: it takes {quoted(shapes)}")
        size = self._inputs[0].shape[0]
        if isinstance(size, int) and size != len(images):  # the file takes one size of batch only
            rows = (np.arange(begin, begin + size) % len(images) for begin in range(0, len(images), size))
            return np.concatenate([self.classify(images[chosen]) for chosen in rows])[: len(images)]
        outputs = self._runner.run({self._inputs[0].name: images})
        logits = outputs[_LOGITS] if _LOGITS in outputs else next(iter(outputs.values()))
        if logits.ndim != 2:
            raise ModelFileError(f"{self.name} is not a classifier: its first output has shape {logits.shape}")
        return logits.astype(np.float32, copy=False)

    def score(self, windows: Sequence[Window]) -> Sequence[TokenScores]:
        """Return the scores of each window. They run as one batch, padded on the right.

        Raises:
            ModelFileError: the model is not a language model, or the runtime fails.
        """
        tokens = np.zeros((len(windows), max(len(w.tokens) for w in windows)), dtype=np.int64)
        for row, window in zip(tokens, windows, strict=True):
            row[: len(window.tokens)] = window.tokens
        logits = self._logits(tokens[:, :-1])  # nothing is predicted after the last token
        found = []
        for index, window in enumerate(windows):
            last = len(window.tokens)
            predictions = logits[index, last - 1 - window.scored : last - 1]
            found.append(score_tokens(predictions, window.tokens[last - window.scored :], threads=self._threads))
        return found

    def _logits(self, tokens: NDArray[np.int64]) -> NDArray[Any]:
        """Logits (batch, length, vocabulary). A causal model does not see the padding, which is to the right."""
        names = {spec.name for spec in self._inputs}
        if "input_ids" not in names:
            raise ModelFileError(f"{self.name} is not a language model: it takes {', '.join(sorted(names))}")
        for spec in self._inputs:
            if spec.name == "input_ids" and any(isinstance(size, int) for size in spec.shape):
                raise ModelFileError(
                    f"{self.name} takes only input_ids of the shape {', '.join(map(str, spec.shape))}, and texts have "
                    "any length: evaluate a file that was exported without --shape"
                )
        if any(name.startswith("past_key_values.") for name in names):
            decoder = Decoder(self._runner, self._inputs)
            decoder.start(len(tokens))
            return decoder.feed(tokens)
        logits = self._run(tokens, names)
        if not self._causal:
            self._check_causal(tokens, names, logits)
            self._causal = True
        return logits

    def _run(self, tokens: NDArray[np.int64], names: set[str]) -> NDArray[Any]:
        """Logits of a model without a cache."""
        inputs: Arrays = {"input_ids": tokens}
        if "attention_mask" in names:
            inputs["attention_mask"] = np.ones_like(tokens)
        if "position_ids" in names:
            inputs["position_ids"] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if missing := sorted(names - inputs.keys()):
            raise ModelFileError(f"{self.name} is not a plain language model: it also takes {', '.join(missing)}")
        outputs = self._runner.run(inputs)
        if _LOGITS not in outputs or outputs[_LOGITS].ndim != 3:
            raise ModelFileError(f"{self.name} is not a language model: it has no logits for each token")
        return outputs[_LOGITS]

    def _check_causal(self, tokens: NDArray[np.int64], names: set[str], logits: NDArray[Any]) -> None:
        """Check that a later token does not change the logits before it, as it does in an encoder such as BERT.

        Raises:
            ModelFileError: it does.
        """
        if tokens.shape[1] < 2:
            return
        half = tokens.shape[1] // 2
        others = tokens[:1].copy()
        others[:, half:] = (others[:, half:] + 1) % logits.shape[-1]
        before = logits[:1, :half].astype(np.float32)
        change = np.abs(self._run(others, names)[:, :half].astype(np.float32) - before)
        if change.max() > _CAUSAL * np.ptp(before):
            raise ModelFileError(
                f"{self.name} is not a causal language model: its predictions depend on later tokens, as those of a "
                "masked language model do, so it has no perplexity and no log-probability of a text"
            )


def _class_names(folder: Path | None) -> tuple[str, ...]:
    """Names of the classes that config.json states; empty if it states none of its own."""
    if folder is None or not (folder / "config.json").is_file():
        return ()
    config = read_json(folder / "config.json")
    named = config.get("id2label")
    if isinstance(named, dict) and all(str(index) in named for index in range(len(named))):
        names = tuple(str(named[str(index)]) for index in range(len(named)))
        stock = all(name == f"LABEL_{index}" for index, name in enumerate(names))
        return () if stock else names
    listed = config.get("label_names")  # timm's key
    return tuple(map(str, listed)) if isinstance(listed, list) else ()


def exported_candidate(exported: ExportedModel, *, name: str, options: EvaluationOptions) -> ModelCandidate:
    """An exported file on the backend of the options.

    Raises:
        IBNormError: the backend needs the address of a server.
    """
    _check_endpoint(name, options.file_backend, options)
    library = fused_library(options.file_backend, options.kernels)
    facts = {
        "files": [sha256_of(file) for file in (exported.path, *exported.external_files)],
        "backend": options.file_backend,
        "version": version_of(_PACKAGES.get(options.file_backend, options.file_backend)),
        "library": None if library is None else sha256_of(library),
        "endpoint": None if options.endpoint is None else [options.endpoint.url, options.endpoint.model],
    }
    outputs = {tensor.name: tensor.shape for tensor in exported.outputs}
    shape = outputs.get(_LOGITS, next(iter(outputs.values()), ()))
    last = shape[-1] if shape and isinstance(shape[-1], int) else 0
    folder = exported.path.parent if (exported.path.parent / "config.json").is_file() else None
    specs = input_specs(exported)
    return ModelCandidate(
        name,
        identity=hash_of(facts),
        facts=ModelFacts(
            folder,
            last if len(shape) == 3 else 0,
            max_positions=exported.metadata.max_positions,
            classes=last if len(shape) == 2 else 0,
            class_names=_class_names(folder),
            image=_image(specs),
        ),
        inputs=specs,
        opener=lambda: open_runner(
            options.file_backend,
            exported,
            threads=options.threads,
            kernels=options.kernels,
            endpoint=options.endpoint,
            spins=False,  # samples are prepared and scored on the same cores
        ),
        generator=lambda: _generate_with(exported, options),
        threads=options.threads,
    )


def _check_endpoint(name: str, backend: str, options: EvaluationOptions) -> None:
    if BACKENDS[backend].needs_endpoint and options.endpoint is None:
        raise IBNormError(
            f"backend {backend} needs the running server of {name}: add --url HOST:PORT, and --name MODEL if it serves "
            "several models"
        )


def genai_candidate(exported: ExportedModel, *, name: str, options: EvaluationOptions) -> ModelCandidate:
    """A folder for onnxruntime-genai, in that runtime.

    Raises:
        ModelFileError: the folder was not exported for it.
    """
    folder = exported.path.parent
    config = folder / GENAI_CONFIG_FILE
    if not config.is_file():
        raise ModelFileError(f"{folder} has no {GENAI_CONFIG_FILE}; export it with --target ort-genai")
    ours = exported_candidate(exported, name=name, options=replace(options, backend=Backend.ORT_CPU))
    facts = [ours.identity, sha256_of(config), version_of("onnxruntime-genai")]
    return ModelCandidate(
        name,
        identity=hash_of({"backend": Target.ORT_GENAI, "facts": facts}),
        facts=ours.facts,
        inputs=[spec for spec in input_specs(exported) if spec.name == "input_ids"],
        opener=lambda: _GenaiRunner(folder, options.threads),
        generator=lambda: open_folder(folder, threads=options.threads),
        threads=options.threads,
    )


class _GenaiRunner:
    """Logits of whole texts. Rows run one by one: with several, GenAI takes some of their tokens for padding."""

    name: str = Target.ORT_GENAI

    def __init__(self, folder: Path, threads: int | None) -> None:
        self._model = open_genai(folder, threads)

    def run(self, inputs: Arrays) -> Arrays:
        tokens = inputs["input_ids"]
        rows = [self._model.start(1, tokens.shape[1]).all_logits(row[None]) for row in tokens]
        return {_LOGITS: np.concatenate(rows)}


def _generate_with(exported: ExportedModel, options: EvaluationOptions) -> TextModel:
    if exported.path.name != MODEL_FILE or not (exported.path.parent / "config.json").is_file():
        raise IBNormError(
            f"{exported.path} has no cache, and this task generates texts; export with --task text-generation"
        )
    if options.file_backend != Backend.ORT_CPU:
        raise IBNormError(f"this task generates texts, which {options.file_backend} cannot here: use --backend ort-cpu")
    return open_folder(exported.path.parent, options.kernels, threads=options.threads)


def _image(specs: Sequence[InputSpec]) -> tuple[int, ...]:
    if len(specs) != 1 or not specs[0].floating or len(specs[0].shape) != 4:
        return ()
    return tuple(size for size in specs[0].shape[1:] if isinstance(size, int))


def torch_candidate(model: LoadedModel, *, name: str, identity: str = "") -> ModelCandidate:
    """A checkpoint in PyTorch, in the dtype of its weights.

    Args:
        model: the checkpoint.
        name: name in the report.
        identity: that of an earlier candidate of the same model; empty computes it, which reads all weights.
    """
    config: Any = getattr(model.module, "config", None)
    folder = Path(model.source) if Path(model.source).is_dir() else None
    image = _image(model.inputs)
    classes = getattr(config, "num_labels", 0) or getattr(model.module, "num_classes", 0)

    def opener() -> Runner:
        from ibnorm_export.runtimes.torch import TorchRunner

        return TorchRunner(model)

    return ModelCandidate(
        name,
        identity=identity or torch_identity(model),
        facts=ModelFacts(
            folder,
            model.vocabulary or (0 if image else int(getattr(config, "vocab_size", 0) or 0)),
            max_positions=model.max_positions,
            classes=int(classes) if image else 0,
            class_names=_class_names(folder),
            image=image,
        ),
        inputs=model.inputs,
        opener=opener,
        generator=lambda: _generate_in_torch(model),
    )


def _generate_in_torch(model: LoadedModel) -> TextModel:
    if model.task is Task.TEXT_GENERATION:
        return open_checkpoint(model)
    from ibnorm_export.models.loading import load

    return open_checkpoint(load(model.source, task=Task.TEXT_GENERATION))


def open_candidate(
    model: Candidate | ExportedModel | LoadedModel | str | Path,
    *,
    options: EvaluationOptions,
    name: str = "",
    weights: Weights | None = None,
) -> Candidate:
    """Make a candidate of whatever can be evaluated.

    Args:
        model: an exported file or folder, a checkpoint, the result of `load`, a text endpoint
            (http://HOST:PORT/v1), or a candidate, which is returned. The text "FILE@BACKEND" is a file on another
            backend than that of the options. A folder for onnxruntime-genai runs there, unless the text or the options
            name a backend.
        options: the backend of exported files.
        name: name in the report; empty takes the name of the file or folder.
        weights: raw or EMA weights, where a checkpoint has both.

    Raises:
        ModelFileError: the file cannot be read.
        CheckpointError: the checkpoint cannot be read.
        BackendUnavailable: the backend is not installed.
    """
    if isinstance(model, ExportedModel):
        return exported_candidate(model, name=name or model.path.name, options=options)
    if not isinstance(model, (str, Path)):
        from ibnorm_export.artifacts.loaded_model import LoadedModel

        if isinstance(model, LoadedModel):
            return torch_candidate(model, name=name or f"{Path(model.source).name} (torch)")
        return model
    if str(model).startswith(("http://", "https://")):
        return EndpointCandidate(str(model), name=name, api_key=options.api_key)
    path, named = _path_and_backend(model)
    if not path.exists() and named is None:
        raise IBNormError(
            f"{path} does not exist; give an exported file or folder, a checkpoint, or http://HOST:PORT/v1 of a server"
        )
    backend = _backend_of(model, options)
    if backend is None:
        from ibnorm_export.models.loading import load

        return torch_candidate(load(path, weights=weights), name=name or f"{path.name} (torch)")
    shown = name or (path.name if named is None else f"{path.name} ({named})")
    if backend == Target.ORT_GENAI:
        return genai_candidate(ExportedModel(path), name=shown, options=options)
    return exported_candidate(ExportedModel(path), name=shown, options=replace(options, backend=backend))


def _path_and_backend(model: str | Path) -> tuple[Path, str | None]:
    """A path, and the backend that "FILE@BACKEND" names; None if the text names no backend."""
    file, _, backend = str(model).rpartition("@")
    if file and (backend in BACKENDS or backend == Target.ORT_GENAI) and not Path(model).exists():
        return Path(file), backend
    return Path(model), None


def _backend_of(model: Any, options: EvaluationOptions) -> str | None:
    """What `open_candidate` runs a model in: a backend, onnxruntime-genai, or None for everything else."""
    if isinstance(model, ExportedModel):
        return options.file_backend
    if not isinstance(model, (str, Path)) or str(model).startswith(("http://", "https://")):
        return None
    path, named = _path_and_backend(model)
    if named is not None:
        return named
    if (path / GENAI_CONFIG_FILE).is_file() and options.backend is None:
        return Target.ORT_GENAI
    return options.file_backend if path.suffix == ".onnx" or (path / MODEL_FILE).is_file() else None


def check_backends(models: Sequence[Any], *, options: EvaluationOptions) -> None:
    """Raise the errors of `open_candidate` about backends before a model is read, which may take minutes.

    Args:
        models: as in `open_candidate`.
        options: the backend of exported files.

    Raises:
        IBNormError: a backend needs the address of a server.
        BackendUnavailable: a backend is not installed.
    """
    for model in models:
        backend = _backend_of(model, options)
        if backend == Target.ORT_GENAI:
            demand_package("onnxruntime_genai", extra="genai", purpose=f"{model} in {backend}")
        elif backend is not None:
            check_backend(backend)
            name = model.path if isinstance(model, ExportedModel) else _path_and_backend(model)[0]
            _check_endpoint(name.name, backend, options)
