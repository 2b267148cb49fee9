"""nanoGPT's ckpt.pt as a GPT-2 folder.

nanoGPT's `GPT` is GPT-2 with Linear layers, whose weights are those of transformers' Conv1D transposed, with an
optional bias, and with the exact GELU (transformers' GPT-2 has the tanh form by default). Source: model.py and train.py
of github.com/karpathy/nanoGPT.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from ibnorm_export.errors import CheckpointError, quoted
from ibnorm_export.models.importers.source import Conversion, TensorReader, TrainingSource, layer_count

__all__ = ["convert", "recognise"]

#: Of each layer, the Linear layers that are Conv1D in transformers.
_LINEAR: Final = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

#: The end of a text in GPT-2's vocabulary, which has 50257 tokens.
_END_OF_TEXT: Final = 50256


def recognise(state: object) -> bool:
    """Whether names of tensors are nanoGPT's."""
    return isinstance(state, dict) and {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"} <= state.keys()


def _config(source: TrainingSource, *, width: int, vocabulary: int, positions: int) -> dict[str, Any]:
    layers = layer_count(source.state, r"transformer\.h\.(\d+)\.")
    shown = {"n_layer": layers, "n_embd": width, "vocab_size": vocabulary, "block_size": positions}
    for name, value in shown.items():
        stated = source.setting(name, default=value)
        if stated != value:
            raise CheckpointError(f"{source.path}: {name} is {quoted(stated)}, but its weights have {value}")
    heads = source.count("n_head")
    if width % heads:
        raise CheckpointError(f"{source.path}: n_head is {heads}, which does not divide n_embd, {width}")
    dropout = source.number("dropout", default=0.0)
    end = _END_OF_TEXT if vocabulary > _END_OF_TEXT else None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "n_positions": positions,
        "vocab_size": vocabulary,
        "activation_function": source.setting("activation_function", default="gelu"),
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "resid_pdrop": dropout,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _head(reader: TensorReader, embedding: Tensor, *, config: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The matrix before the logits, and a note; it is stored only where it differs from the embedding."""
    head = reader.take_if_there("lm_head.weight")
    if head is None or torch.equal(head, embedding):
        config["tie_word_embeddings"] = True
        return {}, "tied head: lm_head and wte are one matrix, which is stored once"
    config["tie_word_embeddings"] = False
    return {"lm_head.weight": head}, "lm_head and wte differ, so both are stored"


def convert(source: TrainingSource) -> Conversion:
    """Convert a checkpoint of nanoGPT.

    Raises:
        CheckpointError: a tensor is missing or has no place in GPT-2, or the settings do not fit the weights.
    """
    reader = source.reader()
    embedding, places = reader.take("transformer.wte.weight"), reader.take("transformer.wpe.weight")
    config = _config(source, width=embedding.shape[1], vocabulary=embedding.shape[0], positions=places.shape[0])
    tensors = {"transformer.wte.weight": embedding, "transformer.wpe.weight": places}
    origins: dict[str, str] = {}
    norms: dict[str, dict[str, Tensor]] = {}
    reader.drop(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which is computed
    without_bias = 0
    for layer in range(config["n_layer"]):
        path = f"transformer.h.{layer}"
        norms |= {f"{path}.{norm}": reader.take_norm(f"{path}.{norm}") for norm in ("ln_1", "ln_2")}
        for linear in _LINEAR:
            name = f"{path}.{linear}"
            weight, bias = reader.take(f"{name}.weight"), reader.take_if_there(f"{name}.bias")
            tensors[f"{name}.weight"] = weight.t()
            origins[f"{name}.weight"] = f"{name}.weight, transposed"
            if bias is None:
                without_bias += 1
                bias = weight.new_zeros(weight.shape[0])
                origins[f"{name}.bias"] = "zeros: the layer has no bias"
            tensors[f"{name}.bias"] = bias
    norms["transformer.ln_f"] = reader.take_norm("transformer.ln_f")
    head, note = _head(reader, embedding, config=config)
    reader.finish("nanoGPT's GPT")
    notes = [note, f"activation: {config['activation_function']} ({_activation_note(source)})"]
    if without_bias:
        notes.append(f"{without_bias} linear layers have no bias: GPT-2 gets zeros")
    if config["vocab_size"] > _END_OF_TEXT + 1:
        notes.append(f"padded vocabulary: {config['vocab_size']} rows, of which GPT-2's tokenizer uses 50257")
    return Conversion(config, tensors | head, norms=norms, origins=origins, notes=tuple(notes))


def _activation_note(source: TrainingSource) -> str:
    if source.setting("activation_function", default=None) is not None:
        return "as stated"
    return (
        "nn.GELU() of nanoGPT's model.py; if yours has the tanh form, add --settings '{\"activation_function\": "
        '"gelu_new"}\''
    )
