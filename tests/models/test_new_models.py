"""Saving a model in the place of an earlier one."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export import IBNormSpec
from tests.support.checkpoints import VIT, save_checkpoint


def test_the_settings_of_the_image_processor_stay(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "vit", VIT, IBNormSpec("T", 3.0, epsilon=1e-5))
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    save_checkpoint(folder, VIT, IBNormSpec("T", 3.0, epsilon=1e-5))
    assert (folder / "preprocessor_config.json").read_text(encoding="utf-8") == "{}"
