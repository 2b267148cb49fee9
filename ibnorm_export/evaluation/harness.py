"""An exported model, or a checkpoint, as a model of EleutherAI's lm-evaluation-harness (`lm_eval`).

lm_eval finds only models of its own package: it reads no entry points (seen in 0.4.13). So this module registers
`ibnorm_onnx` when it is imported, and its command line is lm_eval's own with that done:

    python -m ibnorm_export.evaluation.harness run --model ibnorm_onnx --model_args pretrained=exported/llama \\
        --tasks my_task --include_path tasks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.evaluation.candidates import ModelCandidate, open_candidate
from ibnorm_export.evaluation.options import EvaluationOptions
from ibnorm_export.evaluation.samples import Candidate, Window
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.optional_packages import import_package
from ibnorm_export.runtimes.runner import Kernels

__all__ = ["MODEL_NAME", "IBNormLM", "main"]

#: Name of the model for `lm_eval --model`.
MODEL_NAME: Final = "ibnorm_onnx"

_EXTRA: Final = {"extra": "lm-eval", "purpose": "the evaluation harness"}

_model: Any = import_package("lm_eval.api.model", **_EXTRA)
_registry: Any = import_package("lm_eval.api.registry", **_EXTRA)
_windows: Any = import_package("lm_eval.utils", **_EXTRA)
_generation: Any = import_package("lm_eval.models.utils", **_EXTRA)


class IBNormLM(_model.TemplateLM):  # type: ignore[misc]  # lm_eval is an optional package, imported by name
    """A language model on any backend, for lm_eval. Texts are tokenised as its model `hf` does.

    Args:
        pretrained: an exported file or folder, or a checkpoint, which PyTorch runs; or a candidate of `evaluate`.
        backend: what runs an exported file, e.g. "ort-cpu" or "openvino"; None as in `EvaluationOptions`.
        kernels: how its norms run: "auto", "fused" or "function".
        batch_size: number of texts of one pass.
        max_batch_size: is ignored; lm_eval passes it on.
        max_length: the longest text, in tokens; None takes the positions of the model.
        max_gen_toks: tokens to generate where a task names no number.
        threads: threads of the runtime; None is its default.
        tokenizer: folder of the tokenizer; None takes the model's own.
        device: is ignored; lm_eval passes "cuda:0" by default, and here the backend decides where a model runs.

    Raises:
        IBNormError: the model has no tokenizer, or an option is not legal.
    """

    def __init__(  # lm_eval passes every option of `--model_args` by its name
        self,
        pretrained: str | Path | Candidate,
        *,
        backend: str | None = None,
        kernels: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        threads: int | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise IBNormError(f"batch_size is {quoted(batch_size)}; it must be a whole number from 1")
        options = EvaluationOptions(backend, Kernels(kernels), threads=threads)
        self.batch_size = int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        #: What answers; `evaluate` lets candidates take turns.
        self.candidate: Candidate = open_candidate(pretrained, options=options)
        folder = Path(tokenizer) if tokenizer else self.candidate.facts.folder
        if folder is None or not (folder / "tokenizer.json").is_file():
            raise IBNormError(
                f"{self.candidate.name} has no tokenizer.json beside it; name the folder of the model's tokenizer: "
                "--model_args pretrained=...,tokenizer=FOLDER"
            )
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.max_length = max_length or self.candidate.facts.max_positions or 2048

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise IBNormError("the tokenizer has no end token (eos_token), which this task needs")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context is replaced with."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        first = self.tokenizer.bos_token
        if add_special_tokens is None and first and string.startswith(first):
            options["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **options))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        # Neighbours of similar length waste least on padding; the longest come first, so that memory runs out at once.
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index].tokens))
        found: dict[int, tuple[float, bool]] = {}
        size = override_bs or self.batch_size
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for index, scores in zip(chosen, self.candidate.score([windows[i] for i in chosen]), strict=True):
                found[index] = (float(scores.log_probabilities.sum()), bool(scores.greedy.all()))
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        return [found[index] for index in range(len(windows))]

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """The last tokens that fit: the model reads all but the last of them."""
        tokens: NDArray[np.int64] = np.array([*context, *continuation][-(self.max_length + 1) :], dtype=np.int64)
        return Window(tokens, min(len(continuation), len(tokens) - 1))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, each token with as much context as fits."""
        found = []
        for (text,) in (request.args for request in requests):
            pieces = _windows.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows = [(None, *_windows.make_disjoint_window(piece)) for piece in pieces]
            total = sum(score for score, _ in self._loglikelihood_tokens(windows))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the texts that follow, each up to a stop string, an end token or a number of tokens.

        Raises:
            IBNormError: the model was not exported with a cache, or a task generates more tokens than it has positions.
        """
        if not isinstance(self.candidate, ModelCandidate):
            raise IBNormError(f"{self.candidate.name} generates no texts, which this task needs")
        model = self.candidate.text_model
        found = []
        for context, arguments in (request.args for request in requests):
            wanted = _generation.normalize_gen_kwargs(arguments, self.max_gen_toks)
            room = self.max_length - wanted["max_gen_toks"]
            if room < 1:
                raise IBNormError(
                    f"the task generates {wanted['max_gen_toks']} tokens; the model has {self.max_length} positions, "
                    "and the prompt needs at least one: set max_gen_toks in the task"
                )
            stop = tuple(text for text in wanted["until"] if text)
            sampling = Sampling(wanted["max_gen_toks"], wanted.get("temperature", 0.0), stop=stop)
            prompt = np.array(self.tok_encode(context)[-room:], dtype=np.int64)
            text = model.generate(prompt, sampling).text
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, arguments), text)
        return found


def main() -> None:
    """The command line of lm_eval, which knows this model too."""
    command: Any = import_package("lm_eval.__main__", **_EXTRA)
    command.cli_evaluate()


if __name__ == "__main__":  # `python -m` runs a second copy of this module; the first one registers the model
    from ibnorm_export.evaluation import harness

    harness.main()
else:
    _registry.register_model(MODEL_NAME)(IBNormLM)
