"""Write changed copies of a file, without its external data where a runtime reads that where it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.metadata import Target
from ibnorm_export.artifacts.onnx_file import MODEL_FILE
from ibnorm_export.graph.stored_graph import follow_links

__all__ = ["write_copy"]


def write_copy(model: ir.Model, original: ExportedModel, *, file: Path, refers: bool) -> ExportedModel:
    """Write a changed copy of `original`, and the rest of its folder if it runs as a folder.

    Args:
        model: the copy.
        original: what it was made from.
        file: where the copy is written, in another folder.
        refers: whether the copy may refer to external data in the folder of `original`, which `OrtRunner` finds there.
            If not, and for a file without external data, weights are written next to the copy.
    """
    folder = original.path.parent
    if original.metadata.target is Target.ORT_GENAI and folder != file.parent:
        for other in folder.iterdir():
            if other.is_file() and not other.name.startswith(MODEL_FILE):
                shutil.copyfile(other, file.parent / other.name)
    if refers and original.external_files:
        ir.save(model, file)
        return ExportedModel(file, data_folder=original.data_folder)
    ir.save(follow_links(model), file, external_data=f"{file.name}.data")
    return ExportedModel(file)
