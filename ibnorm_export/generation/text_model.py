"""Generate text with a language model: one loop for every runtime, so that the same seed makes the same choices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tokenizer import FolderTokenizer, TextStream, end_tokens, read_json
from ibnorm_export.errors import ModelFileError, PromptError, quoted
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.sessions import SessionSource, open_sessions, torch_sessions
from ibnorm_export.runtimes.runner import Kernels

if TYPE_CHECKING:  # importing torch takes seconds, and only PyTorch sessions need it
    from ibnorm_export.artifacts.loaded_model import LoadedModel

__all__ = ["TextModel", "TextResult", "open_checkpoint", "open_folder"]


@dataclass(frozen=True, slots=True)
class TextResult:
    """A generated text.

    Args:
        text: the text after the prompt.
        tokens: the tokens of the text.
        prompt_tokens: number of tokens of the prompt.
        stopped: why the text ends: "end" (an end token), "stop" (a string of `Sampling.stop`), "length"
            (max_new_tokens) or "positions" (the model has no more).
        first_token_ms: milliseconds from the start to the first token.
        tokens_per_s: tokens per second after the first.
    """

    text: str
    tokens: tuple[int, ...]
    _: KW_ONLY
    prompt_tokens: int
    stopped: str
    first_token_ms: float
    tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _ignore(text: str) -> None:
    pass


class _GrowingText:
    """A text while its tokens arrive.

    Args:
        stream: decodes tokens.
        sampling: names the stop strings.
    """

    def __init__(self, stream: TextStream, sampling: Sampling) -> None:
        self.tokens: list[int] = []
        self.written = ""
        self._stream, self._sampling = stream, sampling
        self._decoded = 0  # how many of the tokens the stream has received
        self._tail = ""  # decoded, not written: it may still become a stop string

    @property
    def has_stop(self) -> bool:
        """Whether a stop string has been decoded."""
        return self._sampling.find_stop(self._tail) >= 0

    def decode(self) -> None:
        """Decode the tokens that have arrived since the last call."""
        self._stream.extend(self.tokens[self._decoded :])
        self._decoded = len(self.tokens)
        self._tail += self._stream.take()

    def take(self) -> str:
        """Return the decoded text that cannot become part of a stop string; it is written then."""
        piece = self._sampling.without_stop_prefix(self._tail)
        self.written, self._tail = self.written + piece, self._tail[len(piece) :]
        return piece

    def finish(self) -> str:
        """Return what is left to write: the text before a stop string, or all of it."""
        if not self.has_stop:
            self._stream.extend(self.tokens[self._decoded :])
            self._tail += self._stream.rest()
        place = self._sampling.find_stop(self._tail)
        rest = self._tail if place < 0 else self._tail[:place]
        self.written += rest
        return rest


class TextModel:
    """A language model with its tokenizer.

    Args:
        source: starts its sessions.
        tokens: its tokenizer.
        max_positions: the maximum number of tokens of the prompt and the text together.
        ends: the tokens that end a text.
    """

    def __init__(
        self, source: SessionSource, tokens: FolderTokenizer, *, max_positions: int, ends: frozenset[int]
    ) -> None:
        self.backend = source.name
        self._start = source.start
        self._tokens = tokens
        self.max_positions = max_positions
        self._ends = ends

    def generate(
        self,
        prompt: str | NDArray[np.int64],
        sampling: Sampling | None = None,
        *,
        write: Callable[[str], None] = _ignore,
    ) -> TextResult:
        """Continue `prompt`.

        Args:
            prompt: a text of at least one token, or its tokens (n,).
            sampling: how tokens are chosen; None is greedy.
            write: called with each piece of the text, whole characters only.

        Raises:
            PromptError: the prompt is empty or too long.
            ModelFileError: the runtime fails.
        """
        for item in self.steps(prompt, Sampling() if sampling is None else sampling):
            if isinstance(item, TextResult):
                return item
            if item:
                write(item)
        raise AssertionError  # `steps` ends with a result

    def steps(
        self, prompt: str | NDArray[np.int64], sampling: Sampling, *, pace_s: float = 0.0, turn_s: float = 0.0
    ) -> Iterator[str | TextResult]:
        """Like `generate`, but in steps, for a caller that generates several texts at the same time.

        Args:
            prompt: a text of at least one token, or its tokens (n,).
            sampling: how tokens are chosen.
            pace_s: the minimum number of seconds between two pieces. Tokens that arrive sooner are decoded together,
                which costs less.
            turn_s: seconds of computing per step. A step has at least one token, and the first step has exactly one.
                Longer steps are faster: other work after each token evicts the weights of a small model from the
                processor's caches.

        Returns:
            For every step, the piece of text that is due, or "" if none is. At the end the rest of the text, then the
            result.

        Raises:
            PromptError: the prompt is empty or too long.
            ModelFileError: the runtime fails.
        """
        ids = self._encode(prompt)
        room = min(sampling.max_new_tokens, self.max_positions - len(ids))
        text = _GrowingText(self._tokens.stream(), sampling)
        begin = first = time.perf_counter()
        ended_by = "length" if room == sampling.max_new_tokens else "positions"
        written = turn_end = -math.inf
        for token in self._choose(ids, room, sampling=sampling):
            now = time.perf_counter()
            if not text.tokens:
                first = now
            if token in self._ends:
                ended_by = "end"
                break
            text.tokens.append(token)
            if now < turn_end and not sampling.stop:
                continue
            due = now - written >= pace_s
            if due or sampling.stop:
                text.decode()
                if text.has_stop:
                    break
            piece = text.take() if due else ""
            if piece:
                written = now
            if piece or now >= turn_end:
                yield piece
                turn_end = time.perf_counter() + turn_s
        done = time.perf_counter()
        yield text.finish()
        after = max(len(text.tokens) - 1, 0)
        yield TextResult(
            text.written,
            tuple(text.tokens),
            prompt_tokens=len(ids),
            stopped="stop" if text.has_stop else ended_by,
            first_token_ms=(first - begin) * 1e3,
            tokens_per_s=after / (done - first) if done > first and after else 0.0,
        )

    def _encode(self, prompt: str | NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of a prompt.

        Raises:
            PromptError: there are none, or no position is left for the text.
        """
        ids = self._tokens.encode(prompt) if isinstance(prompt, str) else prompt
        if not len(ids):
            raise PromptError("the prompt has no token; give at least one")
        if len(ids) >= self.max_positions:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; the model has {self.max_positions} positions, and the text needs "
                "at least one: shorten the prompt"
            )
        return ids

    def _choose(self, ids: NDArray[np.int64], room: int, *, sampling: Sampling) -> Iterator[int]:
        session = self._start(1, len(ids) + room)
        if sampling.temperature == 0.0:
            session.feed(ids[None])
            for _ in range(room):
                yield int(session.step()[0])
            return
        rng = np.random.default_rng(sampling.seed)
        for _ in range(room):
            token = sampling.choose(session.feed(ids[None])[0], rng)
            yield token
            ids = np.array([token], dtype=np.int64)


def open_checkpoint(model: LoadedModel) -> TextModel:
    """Generate with a checkpoint in PyTorch.

    Args:
        model: loaded for the task "text-generation".

    Raises:
        ModelFileError: the checkpoint has no tokenizer, or one that does not fit the model.
    """
    folder = Path(model.source)
    tokens = FolderTokenizer(folder, model.vocabulary)
    return TextModel(torch_sessions(model), tokens, max_positions=model.max_positions, ends=end_tokens(folder))


def open_folder(
    folder: str | Path,
    kernels: Kernels = Kernels.AUTO,
    *,
    threads: int | None = None,
    backend: str | None = None,
    npm: Path | None = None,
) -> TextModel:
    """Open an exported language model with its tokenizer; see `open_sessions`.

    Args:
        folder: a folder of `export --task text-generation`.
        kernels: how the norms run in ONNX Runtime; a folder for onnxruntime-genai determines that itself.
        threads: number of the runtime's threads; None is its default.
        backend, npm: as in `open_sessions`.

    Raises:
        ModelFileError: the folder, its tokenizer or its op library is incomplete or damaged.
        BackendUnavailable: the runtime is not installed.
        IBNormError: there is no such backend, or it does not suit the folder.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    sizes = (config.get("vocab_size"), config.get("max_position_embeddings", config.get("n_positions")))
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ModelFileError(
            f"{folder / 'config.json'}: vocab_size and the number of positions are {quoted(sizes)}; both must be "
            "positive integers"
        )
    vocabulary, max_positions = (int(str(size)) for size in sizes)
    tokens = FolderTokenizer(folder, vocabulary)
    source = open_sessions(folder, kernels, threads=threads, backend=backend, npm=npm)
    return TextModel(source, tokens, max_positions=max_positions, ends=end_tokens(folder))
