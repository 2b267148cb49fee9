"""A model from a plain PyTorch module in memory: no folder, factory or adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.input_files import Inputs
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.artifacts.module_copy import copy_module
from ibnorm_export.errors import CheckpointError, listed, quoted
from ibnorm_export.models.call_arguments import CallArguments, Dynamic, arguments_of_file, read_arguments
from ibnorm_export.models.named_outputs import named_outputs, unique_names
from ibnorm_export.models.own_norms import NormClass, replace_own_norms
from ibnorm_export.models.registry import adapter_of
from ibnorm_export.models.weights import nonfinite_warnings
from ibnorm_export.op.float64_mode import compute_in_float64
from ibnorm_export.op.norm_variants import BatchIBNorm
from ibnorm_export.op.torch_op import IBNorm

__all__ = ["from_module", "from_module_of_file"]


def from_module(
    module: nn.Module,
    inputs: Inputs,
    *,
    outputs: tuple[str, ...] | None = None,
    dynamic: Dynamic | None = None,
    norm_class: NormClass | None = None,
) -> LoadedModel:
    """Make a plain PyTorch module ready for export, verification and benchmarks.

    Its norms are found and identified, and IBNorm takes their place in a copy. The module itself does not change, and
    the copy shares its weights.

    Args:
        module: any module whose `forward` takes tensors and returns tensors, in tuples, lists, dicts or dataclasses.
        inputs: example inputs: a tensor, a tuple in the order of `forward`, or a dict by argument name; or `InputSpec`.
        outputs: names of the outputs; None takes keys and field names, or output, output_1, ...
        dynamic: names of dynamic axes, {axis: name} for all inputs or {input: {axis: name}}; None makes the first axis
            "batch_size", and {} makes every axis fixed.
        norm_class: the class of your norms, or its name, if it is not named like a norm.

    Raises:
        CheckpointError: the module cannot be copied or run on the inputs, or an input or output is not supported; the
            message states the reason.
    """
    original = _private_copy(module)
    arguments = read_arguments(original, inputs, dynamic=dynamic)
    return _model(original, arguments, outputs=outputs, norm_classes=() if norm_class is None else (norm_class,))


def from_module_of_file(module: nn.Module, exported: ExportedModel) -> LoadedModel:
    """Like `from_module`, for a module from which a file was exported: names, shapes and norms are in the file.

    Raises:
        CheckpointError: as `from_module`.
        ModelFileError: the file has no metadata, or it is damaged.
    """
    exported.require_metadata()
    original = _private_copy(module)
    known = dict(original.named_modules(remove_duplicate=False))
    classes = dict.fromkeys(type(known[path]) for path in exported.metadata.norms if path in known)
    return _model(
        original,
        arguments_of_file(original, exported),
        outputs=tuple(tensor.name for tensor in exported.outputs),
        norm_classes=[c for c in classes if not issubclass(c, (IBNorm, BatchIBNorm)) and adapter_of(c) is None],
    )


def _private_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, without wrappers, that shares the weights and returns no cache.

    Raises:
        CheckpointError: it is not a module, has no values, or cannot be copied.
    """
    while isinstance(module, nn.Module) and not isinstance(module, nn.Sequential):
        wrapped = getattr(module, "_orig_mod", None)  # torch.compile
        if wrapped is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped = module.module
        if not isinstance(wrapped, nn.Module):
            break
        module = wrapped
    if not isinstance(module, nn.Module):
        raise CheckpointError(
            f"the model is {type(module).__name__}; it must be a LoadedModel, the path of a checkpoint or an nn.Module"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise CheckpointError(
            f"{type(module).__name__} has parameters on the device 'meta', which have no values: load its weights"
        )
    copied = copy_module(module).to("cpu").requires_grad_(False)
    config: Any = getattr(copied, "config", None)
    if isinstance(getattr(config, "use_cache", None), bool):  # transformers: a cache is not a tensor
        config.use_cache = False
    return copied


def _hash(module: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of a module's parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _runner(module: nn.Module, arguments: CallArguments, *, where: str) -> Callable[[], object]:
    """A function that calls `module` once on the example, in float64."""
    arrays = arguments.draw(np.random.default_rng(0), 0)
    tensors = [torch.from_numpy(arrays[spec.name]) for spec in arguments.specs]

    def run() -> object:
        try:
            with compute_in_float64(), torch.no_grad():
                return arguments.call(module, *tensors)
        except Exception as error:  # the user's own code may raise anything
            shapes = ", ".join(
                f"{spec.name} {tuple(t.shape)}" for spec, t in zip(arguments.specs, tensors, strict=True)
            )
            raise CheckpointError(
                f"{where} cannot be run on the inputs ({shapes}): {type(error).__name__}: {error}"
            ) from error

    return run


def _model(
    original: nn.Module,
    arguments: CallArguments,
    *,
    outputs: tuple[str, ...] | None,
    norm_classes: Sequence[NormClass],
) -> LoadedModel:
    where = f"forward of {type(original).__name__}"
    module = copy_module(original)
    run = _runner(module, arguments, where=where)
    found = [name for name, _ in named_outputs(run(), where=where)]
    notes = replace_own_norms(module, run=run, norm_classes=norm_classes)
    taken = [*(spec.name for spec in arguments.specs), *original.state_dict()]
    if len(set(taken)) < len(taken):
        twice = listed(sorted({name for name in taken if taken.count(name) > 1}))
        raise CheckpointError(f"{where} has arguments with the names of weights ({twice}): rename the arguments")
    names = unique_names(found, taken) if outputs is None else tuple(outputs)
    if len(names) != len(found) or len({*taken, *names}) < len(taken) + len(names):
        raise CheckpointError(
            f"outputs are {quoted(list(names))}, but {where} returns {len(found)} tensors ({listed(found)}); give each "
            "one a name that no other output, input or weight has"
        )

    def call(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        returned = named_outputs(arguments.call(module, *tensors), where=where)
        if [name for name, _ in returned] != found:
            raise CheckpointError(
                f"{where} returned {[name for name, _ in returned]} for one input and {found} for another; it must "
                "always return the same tensors"
            )
        return tuple(tensor for _, tensor in returned)

    return LoadedModel(
        module,
        "custom",
        original=original,
        inputs=arguments.specs,
        outputs=names,
        call=call,
        sample=arguments.draw,
        source=f"{type(original).__name__} in memory",
        source_sha256=_hash(original),
        warnings=nonfinite_warnings(original),
        notes=notes,
        trace_sizes=arguments.trace_sizes,
        arguments=arguments.to_dict(),
    )
