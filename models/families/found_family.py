"""What the families share whose class of transformers is found by the config.json of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ibnorm_export.models.families.architectures import Architecture
from ibnorm_export.models.families.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FoundFamily"]


class FoundFamily(Family):
    """A family of one class of transformers.

    Args:
        architecture: the class.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.name = architecture.model_type
        self.head = architecture.head
        self._class = architecture.load()
        # An architecture that transforms attention scores (soft-capping) has no scaled_dot_product_attention.
        self.attention = "sdpa" if self._class._supports_sdpa else "eager"

    @property
    def architecture(self) -> type[PreTrainedModel]:
        return self._class

    def settings(self, config: Mapping[str, Any]) -> Any:
        """The settings of a config.json, as transformers parses them."""
        return self._class.config_class(**{key: value for key, value in config.items() if key != "model_type"})
