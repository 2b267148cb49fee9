"""Whether a file was exported from a checkpoint, as far as its metadata and inputs show."""

from __future__ import annotations

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.metadata import Task
from ibnorm_export.errors import ModelFileError

__all__ = ["require_match"]


def require_match(exported: ExportedModel, model: LoadedModel) -> tuple[str, ...]:
    """Refuse a file of another model.

    Args:
        exported: the file.
        model: the checkpoint.

    Returns:
        Notes. A file from another copy of the checkpoint is not refused, but gets a note.

    Raises:
        ModelFileError: the file has no metadata, or its family, inputs or outputs are not those of the checkpoint.
    """
    metadata = exported.require_metadata()
    if metadata.family != model.family:
        raise ModelFileError(
            f"{exported.path} is a {metadata.family} model; the checkpoint {model.source} is {model.family}; "
            "name the one that it was exported from"
        )
    names = {tensor.name for tensor in exported.inputs}
    expected = {spec.name for spec in model.inputs}
    optional = {"position_ids"} if model.task is Task.TEXT_GENERATION else set()
    if not expected - optional <= names <= expected:
        raise ModelFileError(
            f"{exported.path} takes {sorted(names)}; the checkpoint takes {sorted(expected)}: "
            "export the checkpoint again"
        )
    returned = {tensor.name for tensor in exported.outputs}
    if returned != set(model.outputs):
        raise ModelFileError(
            f"{exported.path} returns {sorted(returned)}; the checkpoint returns {sorted(model.outputs)}: "
            "export the checkpoint again"
        )
    if metadata.source_sha256 == model.source_sha256:
        return ()
    return ("the file was exported from another copy of this checkpoint (the hashes of config and weights differ)",)
