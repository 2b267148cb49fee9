"""The interface of a family of models: what the loader must know about an architecture."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ibnorm_export.artifacts.tensors import Arrays, InputSpec
from ibnorm_export.op.float64_mode import compute_in_float64

if TYPE_CHECKING:  # importing transformers takes seconds, so a family imports its own model when it is needed
    from transformers import PreTrainedModel

__all__ = ["Family"]


class Family(abc.ABC):
    """A stock architecture of transformers whose norms are replaced; each family is one subclass in its own file.

    Attributes:
        name: `model_type` of config.json.
        opset: default opset of an export.
        outputs: names of the exported outputs.
        attention: transformers' name of the attention implementation; "eager" for an architecture without attention.
        presets: sizes from the paper, as settings of config.json.
        blocks: path of the list of equal blocks, so that an export need not trace each of them; "" if there is none.
    """

    name: str
    opset: int
    outputs: tuple[str, ...] = ("logits",)
    attention: str = "sdpa"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    blocks: str = ""

    @property
    @abc.abstractmethod
    def architecture(self) -> type[PreTrainedModel]:
        """The class of transformers, imported when it is first used."""

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError for settings of config.json that this version cannot export."""

    def attention_of(self, config: Mapping[str, Any]) -> str:
        """The attention implementation for a config.json; by default that of the family."""
        return self.attention

    def prepare(self, module: nn.Module) -> None:
        """Change stock settings of a loaded `module` that would cause needless work in inference."""

    def make_exact(self, module: nn.Module) -> None:
        """Make a float64 `module` compute in float64 wherever the architecture forces float32."""
        forward = module.forward

        def in_float64(*args: Any, **kwargs: Any) -> Any:
            with compute_in_float64():
                return forward(*args, **kwargs)

        module.forward = in_float64  # `module` is a copy that only the reference uses

    def output_names(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the outputs of `call`, in order; by default those of the family."""
        return self.outputs

    def longest(self, module: nn.Module) -> int:
        """The longest text in tokens; 0 for a model that takes no text, or text of any length."""
        return int(getattr(module.config, "max_position_embeddings", 0) or 0)

    @abc.abstractmethod
    def inputs(self, module: nn.Module) -> tuple[InputSpec, ...]:
        """Inputs of `call`, in order."""

    @abc.abstractmethod
    def call(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model on the inputs, in order."""

    @abc.abstractmethod
    def sample(self, module: nn.Module, rng: np.random.Generator, *, index: int) -> Arrays:
        """Random inputs of realistic shapes; successive values of `index` give all shapes that matter."""

    def valid(self, arrays: Arrays) -> dict[str, NDArray[np.bool_]]:
        """By output name, which leading positions have a defined value; outputs without a mask are valid everywhere."""
        return {}
