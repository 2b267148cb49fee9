"""What an exported folder has besides the weights: configuration, tokenizer, and the names that transformers.js reads.

This module imports neither PyTorch's exporter nor onnxscript, so verification does not wait for them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.tokenizer import TOKENIZER_FILES, FolderTokenizer, read_json

__all__ = [
    "COMPANION_FILES",
    "PREPROCESSOR",
    "TRANSFORMERS_JS",
    "WEB_FILES",
    "WEB_FOLDER",
    "companions",
    "copy_companions",
]

#: The section of config.json that transformers.js reads.
TRANSFORMERS_JS: Final = "transformers.js_config"

#: The folder of the models for transformers.js, and the file of each value of its option `dtype`.
WEB_FOLDER: Final = "onnx"
WEB_FILES: Final = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "q8": "model_quantized.onnx",
    "q4": "model_q4.onnx",
}

#: How images become inputs.
PREPROCESSOR: Final = "preprocessor_config.json"

#: Files that belong to a language model besides its weights: configuration and tokenizer.
COMPANION_FILES: Final = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def companions(model: LoadedModel) -> dict[str, Path]:
    """The files of the checkpoint that an exported folder has too, by name."""
    source = Path(model.source)
    return {name: source / name for name in COMPANION_FILES if (source / name).is_file()}


def _vocabulary_size(source: Path) -> int | None:
    """The number of tokens that an encoder's config.json states, if it does."""
    size = read_json(source / "config.json").get("vocab_size")
    return size if type(size) is int else None  # a bool is an int too


def copy_companions(model: LoadedModel, folder: Path) -> None:
    """Copy the checkpoint's configuration to `folder`, and its tokenizer if it has one.

    Raises:
        ModelFileError: the tokenizer is damaged or does not fit the model's embedding.
    """
    source = Path(model.source)
    if (source / "tokenizer.json").is_file():
        FolderTokenizer(source, model.vocabulary or _vocabulary_size(source))
    for name, file in companions(model).items():
        shutil.copyfile(file, folder / name)
