"""Checkpoints of eight training codes, as their own writers save them: does `import` read them at the first try?

One row for each code. A first try that is refused must name, in one line, the option that the second try adds. The
imported folder is compared with the trained model and its own norm class in float64.

`make training-checkpoints` installs the packages into a folder, and runs this suite.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target, Unavailable
from ibnorm_export import import_checkpoint
from ibnorm_export.errors import IBNormError
from tests.support import vision_operators  # noqa: F401 - lets torchvision load beside a CPU build of torch
from tests.support.import_truth import imported_logits, largest_difference
from tests.support.training_writers import WRITERS, Written

__all__ = ["add_options", "measure"]

#: Rounding in float64, and that of a table of angles that both compute in their own order.
LIMIT = 1e-10


def words_of(options: dict[str, object]) -> list[str]:
    """Options of `import_checkpoint` as the command line has them."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return [f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in texts.items()]


def names(message: str, options: dict[str, object]) -> bool:
    """Whether a message is one line that names every one of these options, values as VALUE where they are free."""
    texts = [f"--{name} {value}" if isinstance(value, str) else f"--{name} '" for name, value in options.items()]
    return bool(options) and "\n" not in message and all(text in message for text in texts)


def tried(written: Written, folder: Path) -> tuple[int, str]:
    """Import a checkpoint; the number of tries, and the message of a refused first one."""
    try:
        import_checkpoint(written.source, folder, **written.options)
    except IBNormError as error:
        message = str(error).replace(str(written.source), written.source.name)
        if not names(message, written.next_options):
            raise
        import_checkpoint(written.source, folder, **written.options, **written.next_options)
        return 2, message
    return 1, ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--only", nargs="+", default=[*WRITERS], choices=[*WRITERS], help="Training codes.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Write, import and compare the checkpoint of every code."""
    for code in options.only:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            try:
                written = WRITERS[code](Path(folder))
            except ModuleNotFoundError as error:
                raise Unavailable(f"{error.name} is not installed; `make training-checkpoints` installs it") from error
            tries, message = tried(written, Path(folder) / "imported")
            error = largest_difference(imported_logits(Path(folder) / "imported", written.inputs), written.truth())
            command = " ".join(["ibnorm-export import", written.source.name, "-o FOLDER", *words_of(written.options)])
            report.add(
                Row(
                    code,
                    {"tries": Figure(tries), "error": Figure(error)},
                    targets=(Target("tries", 2), Target("error", LIMIT)),
                    details={"command": command, "message": message, "next": words_of(written.next_options)},
                    note=message[:160] if tries == 2 else command,
                )
            )
