"""The graph of an exported file, to change and write elsewhere."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ibnorm_export.artifacts.exported_model import ExportedModel

__all__ = ["follow_links", "read_graph"]


def read_graph(exported: ExportedModel) -> ir.Model:
    """Return a model that may be changed; its weights stay those of the file, which are not read.

    Args:
        exported: the file.
    """
    model = ir.serde.deserialize_model(exported.proto)
    ir.external_data.set_base_dir(model.graph, exported.data_folder)
    return model


def follow_links(model: ir.Model) -> ir.Model:
    """Read weights from where symbolic links point to, and return the model.

    In the cache of Hugging Face the files of a folder are links to blobs outside of it. onnx_ir refuses to follow them,
    since a file may name any link; `artifacts.onnx_file.external_files` has checked these.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).is_symlink():
                file = Path(tensor.path).resolve()
                value.const_value = ir.ExternalTensor(
                    file.name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name or "",
                    base_dir=file.parent,
                )
    return model
