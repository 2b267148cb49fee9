"""Identify norms that are named in text: a class of the user's own code, or the norms of a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ibnorm_export.artifacts.input_files import Inputs
from ibnorm_export.artifacts.loaded_model import CustomModel
from ibnorm_export.artifacts.metadata import Weights
from ibnorm_export.choices import choice
from ibnorm_export.errors import CheckpointError, quoted, shortened
from ibnorm_export.models.call_arguments import read_arguments
from ibnorm_export.models.custom import draw_sample, filled_model
from ibnorm_export.models.user_code import import_object
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.op.identification.norms import IdentityReport, identify_norms

__all__ = ["build_norm", "identify_checkpoint"]


def _import(reference: str) -> Any:
    malformed = f"{reference!r} must be package.module:Class, or a checkpoint with --model"
    return import_object(reference, where=reference, malformed=malformed)


def build_norm(reference: str, arguments: Sequence[Any] | Mapping[str, Any] = ()) -> nn.Module:
    """Import a norm, and build it.

    Args:
        reference: "package.module:name" of a class, of a function that returns a norm, or of a norm.
        arguments: arguments of the class or function, by position or by name.

    Raises:
        CheckpointError: it cannot be imported or built, or is not a module of PyTorch.
    """
    found = _import(reference)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise CheckpointError(f"{reference} is {type(found).__name__}; it must be a class, a function or a norm")
        named = isinstance(arguments, Mapping)
        try:
            with torch.random.fork_rng(devices=[]):
                found = found(**arguments) if isinstance(arguments, Mapping) else found(*arguments)
        except Exception as error:  # the user's own code may raise anything
            given = "" if not arguments and not named else f" with {quoted(arguments)}"
            raise CheckpointError(
                f"{reference} cannot be built{given}: {type(error).__name__}: {shortened(str(error))}. Its signature "
                f"is {_signature(_import(reference))}; give arguments with --args, as a JSON list or object"
            ) from error
    if not isinstance(found, nn.Module):
        raise CheckpointError(f"{reference} returns {type(found).__name__}; it must return a torch.nn.Module")
    return found


def _signature(function: Any) -> str:
    try:
        return shortened(f"{function.__name__}{inspect.signature(function)}")
    except (TypeError, ValueError, AttributeError):  # code that has no signature
        return "not known"


def identify_checkpoint(
    checkpoint: str | Path,
    model: str,
    *,
    inputs: Inputs | None = None,
    norm_class: str | None = None,
    weights: Weights | str | None = None,
) -> IdentityReport:
    """Identify every norm of a checkpoint of the user's own code.

    Args:
        checkpoint: a file or folder of weights.
        model: "package.module:factory"; the factory returns a `CustomModel`, or a module of PyTorch.
        inputs: example inputs, for a factory that returns a module.
        norm_class: name, or "module:Class", of a class whose instances are norms whatever they are called.
        weights: "raw" or "ema" weights, where the checkpoint has both.

    Raises:
        CheckpointError: the factory fails, or its model, its weights or the inputs are not valid.
        SpecError: `norm_class` is not a class of the model.
    """
    path = Path(checkpoint)
    chosen = None if weights is None else choice(Weights, weights, name="weights", error=CheckpointError)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    with torch.random.fork_rng(devices=[]):  # the factory draws weights, which are then replaced
        made, _, _ = filled_model(path, model, weights=chosen)
    module = made if isinstance(made, nn.Module) else made.module
    module.eval()
    call = _sample_call(made, model, inputs)

    def run() -> None:
        try:
            with compute_in_float64(), torch.no_grad():
                call()
        except Exception as error:  # the user's own code may raise anything
            raise CheckpointError(f"--model {model}: {type(error).__name__}: {shortened(str(error))}") from error

    return identify_norms(module, run=run, norm_class=norm_class)


def _sample_call(made: CustomModel | nn.Module, model: str, inputs: Inputs | None) -> Callable[[], object]:
    """A call of what a factory returned, on its own sample or on example inputs."""
    rng = np.random.default_rng(0)
    if isinstance(made, CustomModel):
        arrays, module = draw_sample(model, made, rng=rng, index=0), made.module
        return lambda: module(*map(torch.from_numpy, arrays.values()))
    if inputs is None:
        raise CheckpointError(
            f"--model {model} returned {type(made).__name__}, whose inputs are not known: give example inputs with "
            "--inputs FILE.npz (inputs= in Python, inputs in [export.parity] of check.toml), or return an "
            "ibnorm_export.CustomModel"
        )
    arguments = read_arguments(made, inputs)
    drawn = arguments.draw(rng, 0)
    return lambda: arguments.call(made, *(torch.from_numpy(drawn[spec.name]) for spec in arguments.specs))
