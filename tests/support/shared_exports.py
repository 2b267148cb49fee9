"""Checkpoints and exports that are made once for all tests and workers of a session; no test changes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ibnorm_export import models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.exporter.export import ExportOptions, export


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return `folder`, which `make` fills unless it exists; of two workers at once, the first one's is kept."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            made = Path(beside) / folder.name
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


class SharedExports:
    """Exports of the shared checkpoints, each made when it is asked for first.

    Args:
        folder: where they are kept; all workers of a session have the same.
        checkpoints: the checkpoint of each family.
    """

    def __init__(self, folder: Path, checkpoints: Mapping[str, Path]) -> None:
        self._folder = folder
        self._checkpoints = checkpoints

    def __call__(self, family: str, task: str | None = None, **options: Any) -> ExportedModel:
        """Return the export of a family's checkpoint for `task` (None: the family's default) with `ExportOptions`."""
        chosen = ExportOptions(**options)
        default = ExportOptions()
        changed = [key for key in sorted(options) if getattr(chosen, key) != getattr(default, key)]
        name = "-".join([family, task or "default", *(f"{key}_{getattr(chosen, key)}" for key in changed)])

        def make(folder: Path) -> None:
            folder.mkdir()
            source = self._checkpoints[family]
            model = models.load(source) if task is None else models.load(source, task=task)
            export(model, folder / f"{family}.onnx", options=chosen)

        return ExportedModel(once(self._folder / name, make) / f"{family}.onnx")
