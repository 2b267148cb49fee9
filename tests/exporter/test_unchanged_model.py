"""An export works on a copy: neither the model nor the process around it changes."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ibnorm_export import IBNorm, IBNormSpec, models
from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel, torch_dtype
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.artifacts.tensors import DType, InputSpec
from ibnorm_export.errors import CheckpointError
from ibnorm_export.exporter.export import ExportOptions, export
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.exporter.text_folder import export_folder
from ibnorm_export.runtimes.runner import Kernels
from ibnorm_export.runtimes.torch import TorchRunner
from ibnorm_export.verifier.verify import VerifyOptions, verify
from tests.support.shared_exports import SharedExports

FP16 = ExportOptions(DType.FP16)


def state_of(module: nn.Module) -> dict[str, tuple[int, torch.dtype, bytes]]:
    """Identity, type and bits of every parameter and buffer, saved or not."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (id(t), t.dtype, t.detach().numpy().tobytes()) for name, t in tensors.items()}


def settings_of_the_process() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]  # the tuple form, which is the default
        logging.getLogger().level,
        logging.getLogger("torch.onnx").level,
        logging.getLogger().manager.disable,
        list(warnings.filters),
    )


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_fp16_then_fp32_from_one_object(
    request: pytest.FixtureRequest, exports: SharedExports, tmp_path: Path, family: str
) -> None:
    """The second file equals that of a fresh object, and both files pass against the object."""
    model = models.load(request.getfixturevalue(f"{family}_checkpoint"))
    half = export(model, tmp_path / "fp16.onnx", options=FP16)
    whole = export(model, tmp_path / "fp32.onnx")
    assert whole.path.read_bytes() == exports(family).path.read_bytes()
    for exported in (half, whole):
        report = verify(exported, model, options=VerifyOptions(samples=2))
        assert report, report.findings


def test_an_fp32_file_with_rounded_weights_fails(vit_checkpoint: Path, tmp_path: Path) -> None:
    model = models.load(vit_checkpoint)
    rounded = export(model.converted(torch.float16).converted(torch.float32), tmp_path / "fp32.onnx")
    report = verify(rounded, model, options=VerifyOptions(samples=2))
    assert not report
    assert not report.static


@pytest.mark.parametrize(("dtype", "training"), [(DType.FP32, True), (DType.FP16, False), (DType.BF16, True)])
def test_parameters_buffers_and_modes_do_not_change(
    vit_checkpoint: Path, tmp_path: Path, dtype: DType, training: bool
) -> None:
    model = models.load(vit_checkpoint)
    model.module.train(training)
    model.module.requires_grad_(True)
    next(model.module.children()).train(not training)
    before, modes = state_of(model.module), [m.training for m in model.module.modules()]
    settings = settings_of_the_process()
    export(model, tmp_path / "m.onnx", options=ExportOptions(dtype))
    assert state_of(model.module) == before
    assert [m.training for m in model.module.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    assert settings_of_the_process() == settings


@pytest.mark.parametrize(
    "write", [export_folder, lambda m, p, options: export_genai(m, p, options=options, kernels=Kernels.FUNCTION)]
)
def test_the_folders_of_a_language_model(
    tmp_path: Path, genai_model: LoadedModel, write: Callable[..., object]
) -> None:
    before, config = state_of(genai_model.module), genai_model.module.config.to_dict()  # type: ignore[operator, union-attr]  # transformers'
    settings = settings_of_the_process()
    write(genai_model, tmp_path / "out", options=FP16)
    assert state_of(genai_model.module) == before
    assert genai_model.module.config.to_dict() == config  # type: ignore[operator, union-attr]  # transformers'
    assert settings_of_the_process() == settings


@pytest.fixture
def genai_model(tmp_path: Path) -> LoadedModel:
    pytest.importorskip("onnxruntime_genai")
    from tests.support.checkpoints import LLAMA, save_checkpoint

    config = {**LLAMA, "hidden_size": 64, "num_attention_heads": 4}
    folder = save_checkpoint(tmp_path / "llama", config, IBNormSpec("L", 4.0, epsilon=1e-5, bias=False))
    return models.load(folder, task="text-generation")


def test_runners_and_verification_do_not_change_the_mode(vit_checkpoint: Path, exported_vit: ExportedModel) -> None:
    model = models.load(vit_checkpoint)
    model.module.train()
    before, settings = state_of(model.module), settings_of_the_process()
    TorchRunner(model).run(model.sample(np.random.default_rng(0), 0))
    assert verify(exported_vit, model, options=VerifyOptions(samples=2, layers=True))
    assert all(module.training for module in model.module.modules())
    assert not any(module._forward_hooks for module in model.module.modules())
    assert state_of(model.module) == before
    assert settings_of_the_process() == settings


def test_loading_does_not_change_the_random_state(checkpoint: Path) -> None:
    settings = settings_of_the_process()
    models.load(checkpoint)
    assert settings_of_the_process() == settings


# ---- the copy itself ----


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = IBNorm(4, IBNormSpec("S", 4.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1  # type: ignore[operator]  # a buffer
        return self.norm(self.second(self.first(x)))  # type: ignore[no-any-return]  # nn.Module


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_a_copy_shares_the_values_that_have_the_type(dtype: torch.dtype | None) -> None:
    module = Tied()
    copied = copy_module(module, dtype)
    assert isinstance(copied, Tied)
    assert copied.first.weight is copied.second.weight
    for (name, stored), (_, own) in zip(module.named_parameters(), copied.named_parameters(), strict=True):
        assert own is not stored, name
        assert (own.data_ptr() == stored.data_ptr()) == (dtype is not torch.float16)
    copied(torch.zeros(2, 4, dtype=copied.first.weight.dtype))
    assert (float(module.seen), float(copied.seen)) == (0.0, 1.0)  # type: ignore[arg-type]  # buffers
    copied.to(torch.bfloat16)
    assert module.first.weight.dtype == torch.float32


def test_a_module_that_cannot_be_copied_is_an_error(tmp_path: Path) -> None:
    class Locked(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    model = LoadedModel(
        Locked(),
        "custom",
        inputs=(InputSpec("x", ("batch", 4), floating=True),),
        outputs=("y",),
        call=lambda module, x: (module(x),),
        sample=lambda rng, _: {"x": rng.standard_normal((2, 4), dtype=np.float32)},
        source="here",
        source_sha256="",
    )
    with pytest.raises(CheckpointError, match=r"Locked cannot be copied.*define __deepcopy__"):
        export(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_converted_keeps_everything_else(vit_checkpoint: Path) -> None:
    model = models.load(vit_checkpoint)
    for dtype in DType:
        converted = model.converted(torch_dtype(dtype))
        assert {p.dtype for p in converted.module.parameters()} == {torch_dtype(dtype)}
        assert replace(converted, module=model.module) == model
