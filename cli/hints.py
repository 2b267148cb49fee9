"""What a person probably meant: a sentence that is added to an error of usage."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import typer

__all__ = ["check_order", "hint_of"]

#: A name of a model hub, such as meta-llama/Llama-3.2-1B: an owner and a name, neither of which is a path.
_HUB_NAME: Final = re.compile(r"'([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)' does not exist")
#: A file that `export` would write.
_NO_FILE: Final = re.compile(r"'([^']+\.onnx)' does not exist")

_SUFFIXES: Final = frozenset(
    {".onnx", ".plan", ".npz", ".npy", ".json", ".toml", ".txt", ".pt", ".ckpt", ".safetensors"}
)

_NO_OPTION: Final = re.compile(r"No such option:? '?(--?[\w-]+)'?")

#: Options of other tools or other commands, and what to do here.
_ELSEWHERE: Final = {
    **dict.fromkeys(
        ("--atol", "--rtol", "--tolerance"),
        "tolerances follow from PyTorch's error in the same dtype; max_error in a check.toml sets a smaller limit",
    ),
    **dict.fromkeys(("-q", "--quiet", "-v", "--verbose"), "write it after the name of the command"),
    "--device": "choose the runtime with --backend, for example --backend ort-cuda",
    "--precision": "choose the type with --dtype, for example --dtype fp16",
    "--fp16": "write --dtype fp16",
    "--int8": "write --dtype int8 --task text-generation",
    "--int4": "write --dtype int4 --task text-generation",
    "--checkpoint": "the checkpoint is an argument, as in ibnorm-export verify MODEL.onnx CHECKPOINT",
    "--hub": "nothing is downloaded: fetch a model with `hf download`, and name its folder",
}


def hint_of(message: str, options: Sequence[str] = ()) -> str:
    """Return what to add to the message of a usage error; empty if nothing is known.

    Args:
        message: the message.
        options: the options of the command.
    """
    if (hub := _HUB_NAME.search(message)) and Path(hub[1]).suffix not in _SUFFIXES:
        name = hub[1]
        return (
            f"if it is the name of a model on a hub: ibnorm-export downloads nothing; fetch it first, for example with "
            f"`hf download {name} --local-dir {name.partition('/')[2]}`, and name that folder"
        )
    if missing := _NO_FILE.search(message):
        return f"write it first: ibnorm-export export CHECKPOINT -o {shlex.quote(missing[1])}"
    if unknown := _NO_OPTION.search(message):
        if unknown[1] in _ELSEWHERE:
            return _ELSEWHERE[unknown[1]]
        near = difflib.get_close_matches(unknown[1], options, n=2, cutoff=0.7)
        return f"did you mean {' or '.join(near)}?" if near else ""
    return ""


def check_order(file: Path, checkpoint: Path) -> None:
    """Refuse a checkpoint in the place of the file, and the file in the place of the checkpoint.

    Raises:
        typer.BadParameter: the two are exchanged; the message has the command.
    """

    def is_file(path: Path) -> bool:
        return path.suffix == ".onnx" or (path / "model.onnx").is_file()

    if is_file(checkpoint) and not is_file(file):
        raise typer.BadParameter(
            f"the two are exchanged: the exported file comes first. Type: ibnorm-export verify {checkpoint} {file}"
        )
