"""`check` on a folder that timm wrote, with the template as generated: it passes, and fails with a fault."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import onnx
import pytest

from ibnorm_export import NormConfig, replace_norms
from ibnorm_export.cli import main
from ibnorm_export.op.spec import DOMAIN

timm = pytest.importorskip("timm", reason="timm is not installed (make test-families installs it)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint in it."""
    norms = {"compression": "T", "lambda": 3.0, "epsilon": 1e-5, "convention": "divide"}
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    replace_norms(model, NormConfig.from_config(norms))
    timm.models.save_for_hf(model, tmp_path / "my vit", model_config={"ibnorm": norms}, safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ibnorm-export", *words])
    return main.main()


def failures(folder: Path) -> list[tuple[str | None, str | None]]:
    cases = ET.parse(folder / "check-results" / "junit.xml").iter("testcase")
    return [(c.get("classname"), c.get("name")) for c in cases if c.find("failure") is not None]


def test_the_template_passes_and_a_fault_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "check", "--init", "my vit") == 0
    assert run(monkeypatch, "check") == 0
    assert failures(folder) == []

    found = folder / "check-results" / "my-vit.onnx"
    proto = onnx.load(found)
    node = next(n for n in proto.graph.node if n.domain == DOMAIN and n.name == "blocks.1.norm1")
    next(a for a in node.attribute if a.name == "lambd").f = 3.03
    onnx.save(proto, folder / "changed.onnx")
    config = (folder / "check.toml").read_text(encoding="utf-8")
    config = config.replace('# file = "my-vit.onnx" ', 'file = "changed.onnx" ')
    (folder / "check.toml").write_text(config, encoding="utf-8")
    assert run(monkeypatch, "check") == 1
    assert ("my-vit.ort-cpu.layers", "norm blocks.1.norm1") in failures(folder)
    assert ("my-vit.static", "norm blocks.1.norm1 (node blocks.1.norm1)") in failures(folder)
    assert not any(str(place).startswith("my-vit-fp16") for place, _ in failures(folder))
