"""The end of the demo: the trained language model generates text in PyTorch and in every exported form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.errors import BackendUnavailable
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.single_file import SharedBuild
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import TextResult, open_checkpoint, open_folder
from ibnorm_export.graph.quantization import Quantization
from ibnorm_export.progress import Progress, silent
from ibnorm_export.text_report import Report
from ibnorm_export.verifier.report import ParityReport
from ibnorm_export.verifier.verify import verify

__all__ = ["EXPLANATION", "PROMPT", "SAMPLING", "DemoText", "Writing", "trimmed", "write_text"]

PROMPT: Final = "The import statement"
SAMPLING: Final = Sampling(max_new_tokens=160, temperature=0.7, top_p=0.9, seed=1)


#: Why the text has no meaning.
EXPLANATION: Final = (
    "The model is tiny, reads bytes and learned for seconds: it knows the look of the text that it was "
    "trained on, not its meaning. What counts is that every file in fp32 writes what PyTorch writes."
)

#: Characters of a text that are shown.
_SHOWN: Final = 90


def trimmed(text: str) -> str:
    """The beginning of a text on one line, up to the last whole word that fits, then "…"."""
    line = " ".join(text.split())
    start = " " if text[:1].isspace() else ""
    if len(line) <= _SHOWN:
        return start + line
    return f"{start}{line[:_SHOWN].rpartition(' ')[0] or line[:_SHOWN]}…"


@dataclass(frozen=True, slots=True)
class Writing:
    """The text that one form generated, and the report on the form; there is none for PyTorch."""

    form: str
    result: TextResult
    parity: ParityReport | None = None


@dataclass(frozen=True, slots=True)
class DemoText(Report):
    """True when the fp32 forms generated the same text as PyTorch, and every form passed verification.

    Args:
        prompt: the prompt that all of them continue, with the same seed.
        writings: the text of PyTorch, then of the exported forms.
        missing: why a form could not be exported; empty if all could.
    """

    prompt: str
    writings: tuple[Writing, ...]
    missing: str

    @property
    def same(self) -> bool:
        """Whether the fp32 forms generated the same tokens as PyTorch."""
        return len({w.result.tokens for w in self.writings if "int4" not in w.form}) == 1

    def __bool__(self) -> bool:
        return self.same and len(self.writings) > 1 and all(w.parity is None or bool(w.parity) for w in self.writings)

    def __str__(self) -> str:
        lines = ["Text that the LLaMA generates, with the same seed:"]
        lines += [f"{w.form}: {self.prompt}{trimmed(w.result.text)}" for w in self.writings]
        lines.append(EXPLANATION)
        lines.append(f"The fp32 forms generated {'the same text as PyTorch' if self.same else 'A DIFFERENT text'}.")
        if self.missing:
            lines.append(f"note: {self.missing}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        writings = [
            {
                "form": w.form,
                **asdict(w.result),
                "parity": None if w.parity is None else w.parity.to_dict(),
            }
            for w in self.writings
        ]
        return {
            "verdict": "pass" if self else "fail",
            "prompt": self.prompt,
            "same": self.same,
            "missing": self.missing,
            "writings": writings,
        }


def write_text(
    model: LoadedModel, folder: Path, *, held_out: str, shared: SharedBuild, progress: Progress = silent
) -> DemoText:
    """Export a checkpoint for text generation in three forms, verify each, and generate text with all.

    Args:
        model: a language model with a tokenizer, loaded for text generation.
        folder: receives `llama-portable/`, `llama-genai/` and `llama-genai-int4/`.
        held_out: text that was not trained on; predictions on it are compared.
        shared: traces the model for the portable form.
        progress: receives the progress of the work.
    """
    writings = [Writing("PyTorch", open_checkpoint(model).generate(PROMPT, SAMPLING))]
    int4 = ExportOptions(quantization=Quantization(4))
    missing = ""
    for form, name, target, options in (
        ("ONNX Runtime, portable", "llama-portable", Target.PORTABLE, None),
        ("onnxruntime-genai", "llama-genai", Target.ORT_GENAI, None),
        ("onnxruntime-genai, int4", "llama-genai-int4", Target.ORT_GENAI, int4),
    ):
        place = folder / name
        try:
            if target is Target.PORTABLE:
                exported = export_folder(model, place, options=options, shared=shared, progress=progress)
            else:
                exported = export(model, place, options=options, target=target, progress=progress)
        except BackendUnavailable as error:  # all forms but the portable one need another package
            missing = str(error)
            continue
        parity = verify(exported, model, progress=progress, text=held_out)
        writings.append(Writing(form, open_folder(place).generate(PROMPT, SAMPLING), parity))
    return DemoText(PROMPT, tuple(writings), missing)
