"""The graph of an exported file, to change and write elsewhere."""

from __future__ import annotations

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel

__all__ = ["read_graph"]


def read_graph(exported: ExportedModel) -> ir.Model:
    """Return a model that may be changed; its weights stay those of the file, which are not read.

    Args:
        exported: the file.
    """
    model = ir.serde.deserialize_model(exported.proto)
    ir.external_data.set_base_dir(model.graph, exported.data_folder)
    return model
