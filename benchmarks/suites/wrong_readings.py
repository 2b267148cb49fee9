"""Wrong readings of a training code's norm: does any of them pass?

Each norm is read as IBNorm-L with lambda 4 and epsilon 1e-2, and computes something else. One row for each norm and
each place where the truth is at hand: an adapter beside the class itself, an adapter of its base class, and values that
the training code saved (`verify --expected`). The target is that none passes. The same norm read rightly must pass
everywhere, so that a refusal proves something. Where nobody states a reading, the class is identified, and the exported
file must compute what the class does (or its own operators), in plain onnxruntime, to 2e-6.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from ibnorm_export import IBNormSpec, VerifyOptions, export, models, verify
from ibnorm_export.errors import IBNormError
from ibnorm_export.models import register_adapter
from tests.support.checkpoints import LLAMA, save_checkpoint
from tests.support.trained_norms import EPSILON, LAMBDA, NORMS, TrainedNorm, saved_by_training, trained

__all__ = ["add_options", "measure"]

READ = IBNormSpec.from_convention("L", LAMBDA, epsilon=EPSILON, convention="divide")
TINY = LLAMA | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


class Net(nn.Module):
    """A training code's model around one norm class."""

    def __init__(self, norm: type[TrainedNorm]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.norm, self.last = (norm(torch.randn(16), torch.randn(16)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.second(self.norm(self.first(x))))
        return result


def _adapted(norm: type[TrainedNorm]) -> type[TrainedNorm]:
    """The same norm as its own class, since what is registered for a class stays registered."""
    own = type(f"Adapted{norm.__name__}", (norm,), {})
    register_adapter(own, lambda module: READ)
    return own


def _below_adapted(norm: type[TrainedNorm]) -> type[TrainedNorm]:
    """The same norm as a subclass of one that an adapter was written for."""
    base = type("AdaptedBase", (TrainedNorm,), {})
    register_adapter(base, lambda module: READ)
    return type(norm.__name__, (base,) if norm is TrainedNorm else (norm, base), {})


def adapter(norm: type[TrainedNorm], folder: Path) -> str:
    """What refuses a model whose adapter states the reading; empty where it passes."""
    return _refusal(lambda: _exported_and_verified(_adapted(norm), folder))


def adapter_of_a_base_class(norm: type[TrainedNorm], folder: Path) -> str:
    """What refuses a model whose adapter was written for the base class."""
    return _refusal(lambda: _exported_and_verified(_below_adapted(norm), folder))


def _exported_and_verified(norm: type[TrainedNorm], folder: Path) -> str:
    net = Net(norm)
    x = torch.randn(8, 6)
    exported = export(net, folder / "net.onnx", inputs=(x,))
    report = verify(exported.path, net, inputs=(x,))
    return "" if report else str(report.findings[0])


def expected_values(norm: type[TrainedNorm], folder: Path) -> str:
    """What `verify --expected` finds where only the reading is there: the config.json of a folder."""
    checkpoint = save_checkpoint(folder / "llama", TINY, READ, seed=3)
    model = models.load(checkpoint)
    values = folder / "values.npz"
    np.savez(values, **saved_by_training(trained(model.module, norm)))
    exported = export(model, folder / "llama.onnx")
    report = verify(exported, model, options=VerifyOptions(samples=1, expected=values))
    return "" if report else str(report.findings[0])


def _refusal(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except IBNormError as error:
        return str(error)


def identified_error(norm: type[TrainedNorm], folder: Path) -> float:
    """The error of the exported file in onnxruntime, against the class itself, where nobody states a reading."""
    net, x = Net(norm), 3.0 * torch.randn(64, 6)
    exported = export(net, folder / "net.onnx", inputs=(x,))
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        truth = net.double()(x.double()).numpy()
    return float(np.abs(found - truth).max() / np.abs(truth).max())


PLACES = {
    "adapter": adapter,
    "adapter of its base class": adapter_of_a_base_class,
    "--expected": expected_values,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--only", nargs="+", default=[*NORMS], choices=[*NORMS], help="Norms.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Try each wrong reading in each place, and the right one."""
    for place, attempt in PLACES.items():
        report.add(_row("read rightly", place, attempt, norm=TrainedNorm))
        for name in options.only:
            report.add(_row(name, place, attempt, norm=NORMS[name]))
    for name, norm in {"read rightly": TrainedNorm, **{name: NORMS[name] for name in options.only}}.items():
        with tempfile.TemporaryDirectory() as folder:
            error = Figure(identified_error(norm, Path(folder)))
        report.add(Row(f"{name}: identified", {"error": error}, targets=(Target("error", 2e-6),)))


def _row(name: str, place: str, attempt: Callable[[type[TrainedNorm], Path], str], *, norm: type[TrainedNorm]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        refusal = attempt(norm, Path(folder)).replace(folder, "")
    right = norm is TrainedNorm
    figures = {"passed": Figure(int(not refusal))}
    target = Target("passed", 1, at_least=True) if right else Target("passed", 0)
    return Row(f"{name}: {place}", figures, targets=(target,), note=refusal.splitlines()[0][:200] if refusal else "")
