"""Two LLaMAs that write text, and their folders for each runtime, made once; no test changes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ibnorm_export import IBNormSpec, models
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.runtimes.runner import Kernels
from tests.support.checkpoints import LLAMA, save_checkpoint
from tests.support.shared_exports import once


@pytest.fixture(scope="session")
def language_checkpoint(shared_folder: Path, llama_checkpoint: Path) -> Path:
    """The small LLaMA with a tokenizer of bytes."""

    def make(folder: Path) -> None:
        shutil.copytree(llama_checkpoint, folder)
        write_byte_tokenizer(folder)

    return once(shared_folder / "text" / "language", make)


@pytest.fixture(scope="session")
def genai_checkpoint(shared_folder: Path) -> Path:
    """A LLaMA with a tokenizer of bytes and heads of 16, the smallest that GroupQueryAttention rotates."""

    def make(folder: Path) -> None:
        save_checkpoint(folder, {**LLAMA, "hidden_size": 64}, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False))
        write_byte_tokenizer(folder)

    return once(shared_folder / "text" / "llama", make)


@pytest.fixture(scope="session")
def portable_folder(shared_folder: Path, language_checkpoint: Path) -> Path:
    """The small LLaMA in standard operators."""

    def make(folder: Path) -> None:
        export_folder(models.load(language_checkpoint, task="text-generation"), folder)

    return once(shared_folder / "text" / "language-portable", make)


@pytest.fixture(scope="session")
def text_folder(shared_folder: Path, genai_checkpoint: Path) -> Callable[[str], Path]:
    """The folder of `genai_checkpoint` that a form names: portable, genai, or genai-function, without fused kernels."""

    def of(form: str) -> Path:
        def make(folder: Path) -> None:
            model = models.load(genai_checkpoint, task="text-generation")
            if form == "portable":
                export_folder(model, folder)
            else:
                export_genai(model, folder, kernels=Kernels.FUNCTION if form == "genai-function" else Kernels.AUTO)

        return once(shared_folder / "text" / f"llama-{form}", make)

    return of
