"""Checkpoints of eight training codes, written by their own functions from models with a stranger's norms.

A writer trains a tiny model for a step, saves it, and returns what an import is compared with. Those of nanoGPT, GaLore
and torchvision's references are scripts, not packages: their few lines of saving are repeated here, around PyTorch's
and transformers' own functions.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ibnorm_export.op.float64_mode import compute_in_float64
from tests.support.strangers import GPT, ChannelNorm, LogNorm, shake

__all__ = ["WRITERS", "Written"]

_NORMS = "tests.support.strangers"
_GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "bias": True, "vocab_size": 65, "dropout": 0.0}
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 48,
    "max_position_embeddings": 32,
}


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that a training code has saved.

    Args:
        source: the file or folder.
        model: the trained model, in evaluation mode.
        inputs: for its forward.
        options: what `import_checkpoint` is given at first: the norm class, and what no checkpoint of this code states.
        next_options: what the message of a refused first try asks for, as options.
        logits: (output of the model) -> logits.
        exact: makes a float64 model compute the tables anew that it has in float32.
    """

    source: Path
    model: nn.Module
    _: KW_ONLY
    inputs: Tensor
    options: dict[str, Any]
    next_options: dict[str, Any] = field(default_factory=dict)
    logits: Callable[[Any], Tensor] = lambda output: output
    exact: Callable[[Any], None] = lambda model: None

    def truth(self) -> Tensor:
        """Logits in float64."""
        wide = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        model = copy.deepcopy(self.model).double()
        with torch.no_grad(), compute_in_float64():  # rotary tables of transformers are float32 otherwise
            self.exact(model)
            return self.logits(model(wide))


def _ids(vocabulary: int, length: int) -> Tensor:
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))


def _pixels(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def _log_norm(bias: bool = True) -> dict[str, Any]:
    return {"norm_class": f"{_NORMS}:LogNorm", "norm_args": {"bias": bias}}


def _gpt() -> GPT:
    torch.manual_seed(0)  # the processes of `distributed` build the same
    return shake(GPT(_GPT, lambda c: LogNorm(c.n_embd, bias=c.bias)))  # type: ignore[return-value]  # the same module


def _with_norms(model: nn.Module, names: tuple[str, ...], width: int) -> nn.Module:
    """The model with `LogNorm` in place of its modules of some names."""
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if name in names:
                setattr(module, name, LogNorm(width, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():  # no buffers: rotary tables are among them
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _trained(model: nn.Module, loss: Callable[[], Tensor]) -> torch.optim.Optimizer:
    """One step of AdamW, so that the optimizer has a state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    loss().backward()
    optimizer.step()
    model.eval()
    return optimizer


def nanogpt(folder: Path) -> Written:
    """train.py of github.com/karpathy/nanoGPT, with its default compile=True."""
    model, ids = _gpt(), _ids(65, 24)
    optimizer = _trained(model, lambda: model(ids).square().mean())
    compiled = torch.compile(model)
    checkpoint = {
        "model": compiled.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": _GPT,
        "iter_num": 1,
        "best_val_loss": torch.tensor(4.2),
        "config": {"out_dir": "out", "learning_rate": 1e-3, "compile": True},
    }
    torch.save(checkpoint, folder / "ckpt.pt")
    return Written(folder / "ckpt.pt", model, inputs=ids, options=_log_norm())


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**_LLAMA, pad_token_id=None, bos_token_id=0, eos_token_id=1))
    return _with_norms(model, ("input_layernorm", "post_attention_layernorm", "norm"), _LLAMA["hidden_size"])


def galore(folder: Path) -> Written:
    """torchrun_main.py of github.com/jiaweizzhao/GaLore: save_pretrained, the optimizer and the state of training."""
    model, ids = _llama(), _ids(48, 32)
    optimizer = _trained(model, lambda: model(ids, labels=ids).loss)
    place = folder / "model_1"
    model.save_pretrained(place, max_shard_size="100GB")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "update_step": 1,
        "dtype": "fp32",
    }
    torch.save(state, place / "optimizer.pt")
    (place / "training_state.json").write_text(json.dumps({"global_step": 1, "tokens_seen": 64}))
    return Written(place, model, inputs=ids, options=_log_norm(bias=False), logits=lambda out: out.logits)


def huggingface(folder: Path) -> Written:
    """transformers' Trainer: the folder checkpoint-1."""
    from transformers import Trainer, TrainingArguments

    model, ids = _llama(), _ids(48, 32)
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=9
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]  # any sequence is taken
    model.eval()
    place = folder / "out" / "checkpoint-1"
    return Written(place, model, inputs=ids, options=_log_norm(bias=False), logits=lambda out: out.logits)


def timm(folder: Path) -> Written:
    """CheckpointSaver of timm with averaged weights, as its train.py calls it."""
    from timm import create_model
    from timm.utils import CheckpointSaver, ModelEmaV3

    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    name = "vit_tiny_patch16_224"
    model = shake(create_model(name, num_classes=10, norm_layer=lambda width, **_: LogNorm(width), **given))
    pixels = _pixels(32)
    optimizer = _trained(model, lambda: model(pixels).square().mean())
    average = ModelEmaV3(model, decay=0.5)
    _trained(model, lambda: model(pixels).square().mean())
    average.update(model, step=1)
    arguments = argparse.Namespace(
        model=name,
        num_classes=10,
        img_size=32,
        input_size=None,
        in_chans=None,
        gp=None,
        model_kwargs=given,
        opt="adamw",
    )
    saver = CheckpointSaver(model, optimizer, args=arguments, model_ema=average, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, metric=12.5)
    return Written(
        folder / "last.pth.tar",
        average.module.eval(),
        inputs=pixels,
        options=_log_norm(),
        next_options={"weights": "ema"},
    )


def torchvision(folder: Path) -> Written:
    """references/classification/train.py of github.com/pytorch/vision, with --model-ema."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model = shake(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, norm_layer=ChannelNorm))
    pixels = _pixels(32)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = _trained(model, lambda: model(pixels).square().mean())
    average.update_parameters(model)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3).state_dict(),
        "epoch": 0,
        "args": argparse.Namespace(model="resnet18", val_crop_size=32, train_crop_size=32, batch_size=2, device="cpu"),
        "model_ema": average.state_dict(),
    }
    torch.save(checkpoint, folder / "checkpoint.pth")
    return Written(
        folder / "checkpoint.pth",
        average.module.eval(),
        inputs=pixels,
        options={"norm_class": f"{_NORMS}:ChannelNorm"},
        next_options={"weights": "ema"},
    )


def lightning(folder: Path) -> Written:
    """Lightning's Trainer with ModelCheckpoint."""
    import lightning as lightning_

    ids = _ids(65, 24)

    class Task(lightning_.LightningModule):
        def __init__(self, model_args: dict[str, Any], lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = _gpt()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    task = Task(_GPT, 1e-3)
    trainer = lightning_.Trainer(
        default_root_dir=folder,
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, torch.utils.data.DataLoader(ids, batch_size=2))
    (source,) = (folder / "checkpoints").glob("*.ckpt")
    return Written(source, task.model.eval(), inputs=ids, options=_log_norm())


def litgpt(folder: Path) -> Written:
    """save_checkpoint of litgpt's pretraining, with Lightning's Fabric."""
    from lightning.fabric import Fabric
    from litgpt import GPT as LitGPT  # noqa: N811 - the other GPT is nanoGPT's
    from litgpt import Config
    from litgpt.pretrain import save_checkpoint

    config = Config(
        name="tiny",
        block_size=32,
        n_layer=2,
        n_embd=16,
        n_head=4,
        n_query_groups=2,
        vocab_size=60,
        padded_vocab_size=64,
        intermediate_size=24,
        mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = _with_norms(LitGPT(config), ("norm_1", "norm_2", "ln_f"), config.n_embd)
    ids = _ids(60, 20)
    model, optimizer = fabric.setup(inner, torch.optim.AdamW(inner.parameters(), lr=1e-3))
    fabric.backward(model(ids).square().mean())
    optimizer.step()
    inner.eval()
    state = {"model": model, "optimizer": optimizer, "iter_num": 1, "step_count": 1, "hparams": {"seed": 42}}
    with mock.patch.object(sys, "argv", ["pretrain", "tiny"]):  # whose options it saves
        save_checkpoint(fabric, state, None, folder / "step-1" / "lit_model.pth")
    return Written(
        folder / "step-1",
        inner,
        inputs=ids,
        options=_log_norm(bias=False),
        exact=lambda model: model.reset_parameters(),
    )


def _sharded(rank: int, folder: str) -> None:
    """One of two processes that train a GPT in shards and save it."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    model: Any = _gpt()
    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, "step": 1}, checkpoint_id=f"{folder}/step-1")
    dist.destroy_process_group()


def distributed(folder: Path) -> Written:
    """torch.distributed.checkpoint of a model in shards (FSDP2), saved by two processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.multiprocessing.spawn(_sharded, args=(str(folder),), nprocs=2)
    stated = {"settings": {"n_head": 2}}
    return Written(folder / "step-1", _gpt(), inputs=_ids(65, 24), options=_log_norm(), next_options=stated)


#: By training code, what writes a checkpoint into a folder.
WRITERS: dict[str, Callable[[Path], Written]] = {
    "nanoGPT": nanogpt,
    "GaLore": galore,
    "transformers Trainer": huggingface,
    "timm": timm,
    "torchvision": torchvision,
    "Lightning": lightning,
    "torch.distributed.checkpoint": distributed,
    "litgpt": litgpt,
}
