"""Checkpoints of torchvision's reference training as a ResNet folder of transformers.

The bottleneck of torchvision has its stride in the 3x3 convolution, which is the default of transformers too. Source:
references/classification/train.py and models/resnet.py of github.com/pytorch/vision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ibnorm_export.errors import CheckpointError
from ibnorm_export.models.importers.source import Conversion, TensorReader, TrainingSource, layer_count

__all__ = ["convert", "recognise"]


def recognise(state: object) -> bool:
    """Whether names of tensors are those of torchvision's ResNet."""
    return isinstance(state, dict) and {"conv1.weight", "layer1.0.conv1.weight", "fc.weight"} <= state.keys()


def _config(source: TrainingSource) -> dict[str, Any]:
    state: Mapping[str, Tensor] = source.state
    stages = layer_count(state, r"layer(\d+)\.") - 1
    bottleneck = "layer1.0.conv3.weight" in state
    last = "conv3" if bottleneck else "conv2"
    widths = [state[f"layer{stage}.0.{last}.weight"].shape[0] for stage in range(1, stages + 1)]
    stem, classes = state["conv1.weight"], state["fc.weight"].shape[0]
    if bottleneck and state["layer1.0.conv1.weight"].shape[0] * 4 != widths[0]:
        raise CheckpointError(
            f"{source.path}: the first block has {state['layer1.0.conv1.weight'].shape[0]} inner channels and "
            f"{widths[0]} outer ones; transformers' ResNet has a quarter inside, so Wide ResNet and ResNeXt cannot be "
            "imported. Export your own code with --model package.module:factory"
        )
    size = source.setting("val_crop_size", "image_size", default=224)
    return {
        "model_type": "resnet",
        "architectures": ["ResNetForImageClassification"],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "depths": [layer_count(state, rf"layer{stage}\.(\d+)\.") for stage in range(1, stages + 1)],
        "hidden_sizes": widths,
        "embedding_size": stem.shape[0],
        "num_channels": stem.shape[1],
        "image_size": size,
        "hidden_act": "relu",
        "downsample_in_bottleneck": False,
        "id2label": {str(label): f"LABEL_{label}" for label in range(classes)},
        "label2id": {f"LABEL_{label}": label for label in range(classes)},
    }


def _convert_block(
    reader: TensorReader, old: str, *, new: str, convolutions: int
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of the convolutions of a block, old to new, and the paths of its norms, old to new."""
    names = {f"{old}.conv{i + 1}.weight": f"{new}.layer.{i}.convolution.weight" for i in range(convolutions)}
    norms = {f"{old}.bn{i + 1}": f"{new}.layer.{i}.normalization" for i in range(convolutions)}
    if f"{old}.downsample.0.weight" in reader.rest:
        names[f"{old}.downsample.0.weight"] = f"{new}.shortcut.convolution.weight"
        norms[f"{old}.downsample.1"] = f"{new}.shortcut.normalization"
    return names, norms


def convert(source: TrainingSource) -> Conversion:
    """Convert a checkpoint of torchvision's reference training.

    Raises:
        CheckpointError: the model is not a ResNet of transformers, or a tensor is missing or has no place in it.
    """
    config, reader = _config(source), source.reader()
    names = {
        "conv1.weight": "resnet.embedder.embedder.convolution.weight",
        "fc.weight": "classifier.1.weight",
        "fc.bias": "classifier.1.bias",
    }
    paths = {"bn1": "resnet.embedder.embedder.normalization"}
    for stage, depth in enumerate(config["depths"]):
        for block in range(depth):
            new = f"resnet.encoder.stages.{stage}.layers.{block}"
            found = _convert_block(
                reader,
                f"layer{stage + 1}.{block}",
                new=new,
                convolutions=3 if config["layer_type"] == "bottleneck" else 2,
            )
            names |= found[0]
            paths |= found[1]
    reader.drop(r".*\.num_batches_tracked")  # a counter of training that inference does not use
    tensors = {new: reader.take(old) for old, new in names.items()}
    norms = {new: reader.take_norm(old) for old, new in paths.items()}
    reader.finish("torchvision's ResNet")
    return Conversion(
        config,
        tensors,
        norms=norms,
        origins={new: old for old, new in names.items()},
        notes=(f"images: {config['image_size']} pixels, from val_crop_size of the training code or 224",),
    )
