"""litgpt's lit_model.pth as a LLaMA folder.

The rotary embedding turns the two halves of a head, as in transformers, so rows keep their order. The fused matrix of
queries, keys and values is [all queries, all keys, all values] in `attn.qkv`, and interleaved by group in the older
`attn.attn`. Source: convert_lit_checkpoint.py and model.py of github.com/Lightning-AI/litgpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ibnorm_export.errors import CheckpointError, quoted
from ibnorm_export.models.importers.source import Conversion, TensorReader, TrainingSource, finite_number, layer_count

__all__ = ["convert", "recognise"]

_FIXED: Final = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}
#: Linear layers: litgpt's name and that of transformers.
_LINEAR: Final = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_NORMS: Final = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}

#: Settings of litgpt that LLaMA has in one form only, with that form. litgpt's own default may be another.
_LLAMA_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "mlp_class_name": ("LLaMAMLP",),
    "parallel_residual": (False,),
    "shared_attention_norm": (False, None),
    "rotary_percentage": (1, 1.0),
    "norm_qk": (False, None),
    "post_attention_norm": (False, None),
    "post_mlp_norm": (False, None),
    "sliding_window_size": (None,),
    "attention_logit_softcapping": (None,),
    "attention_scores_scalar": (None,),
    "final_logit_softcapping": (None,),
    "scale_embeddings": (False, None),
    "rope_interleave": (False, None),
    "rope_local_base_freq": (None,),
    "lm_head_bias": (False, None),
    "latent_attention": (None,),
    "norm_1": (True, None),
    "norm_2": (True, None),
}


def recognise(state: object) -> bool:
    """Whether names of tensors are litgpt's."""
    return (isinstance(state, dict) and "transformer.h.0.norm_1.weight" in state) or (
        isinstance(state, dict) and any(f"transformer.h.0.attn.{fused}.weight" in state for fused in ("qkv", "attn"))
    )


def _rotary(source: TrainingSource) -> dict[str, Any]:
    """`rope_parameters` of config.json.

    Raises:
        CheckpointError: the frequencies are scaled in a way that this version does not convert.
    """
    base = source.number("rope_base", default=10000)
    condense = source.number("rope_condense_ratio", default=1)
    scaled = source.setting("rope_adjustments", default=None)
    if scaled is None:
        if condense == 1:
            return {"rope_type": "default", "rope_theta": base}
        return {"rope_type": "linear", "rope_theta": base, "factor": condense}
    keys = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
    if condense != 1 or not isinstance(scaled, Mapping) or set(scaled) != keys:
        raise CheckpointError(
            f"{source.path}: rope_adjustments is {quoted(scaled)}; it must be empty, or have the keys of Llama 3: "
            f"{', '.join(sorted(keys))}"
        )
    numbers = {
        name: finite_number(value, f"{source.path}: {name} of rope_adjustments") for name, value in scaled.items()
    }
    length = numbers.pop("original_max_seq_len")
    return {"rope_type": "llama3", "rope_theta": base, **numbers, "original_max_position_embeddings": int(length)}


def _config(source: TrainingSource, *, width: int, rows: int) -> dict[str, Any]:
    for name, legal in _LLAMA_ONLY.items():
        value = source.setting(name, default=legal[-1])
        if value not in legal:
            raise CheckpointError(
                f"{source.path}: {name} is {quoted(value)}, and LLaMA has {legal[0]}. Convert this model with "
                "litgpt's own `litgpt convert_from_litgpt`, or export your own code with --model"
            )
    heads = source.count("n_head")
    layers = layer_count(source.state, r"transformer\.h\.(\d+)\.")
    for name, shown in (("n_embd", width), ("n_layer", layers)):
        stated = source.setting(name, default=shown)
        if stated != shown:
            raise CheckpointError(f"{source.path}: {name} is {quoted(stated)}, but its weights have {shown}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": source.state["transformer.h.0.mlp.fc_1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": source.count("n_query_groups", default=heads),
        "head_dim": source.count("head_size", default=width // heads),
        "vocab_size": rows,
        "max_position_embeddings": source.count("block_size"),
        "rope_parameters": _rotary(source),
        "attention_bias": "transformer.h.0.attn.qkv.bias" in source.state
        or "transformer.h.0.attn.attn.bias" in source.state,
        "mlp_bias": "transformer.h.0.mlp.fc_1.bias" in source.state,
        "bos_token_id": source.setting("bos_token_id", default=None),
        "eos_token_id": source.setting("eos_token_id", default=None),
    }


def _queries_keys_values(
    reader: TensorReader, layer: str, *, kind: str, config: Mapping[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], str] | None:
    """The three parts of the fused weight or bias of one layer, and its name; None if there is none.

    Raises:
        CheckpointError: its rows are not what the numbers of heads and their size give.
    """
    fused, interleaved = reader.take_if_there(f"{layer}.attn.qkv.{kind}"), False
    name = f"{layer}.attn.qkv.{kind}"
    if fused is None:
        name = f"{layer}.attn.attn.{kind}"
        fused, interleaved = reader.take_if_there(name), True
    if fused is None:
        return None
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    if heads % groups or len(fused) != (heads + 2 * groups) * size:
        raise CheckpointError(
            f"{reader.path}: {name} has {len(fused)} rows, but n_head {heads}, n_query_groups {groups} and head_size "
            f"{size} need {(heads + 2 * groups) * size}"
        )
    if not interleaved:
        query, key, value = torch.split(fused, [heads * size, groups * size, groups * size])
        return (query, key, value), name
    per_group = fused.reshape(groups, heads // groups + 2, size, *fused.shape[1:])
    parts = torch.split(per_group, [heads // groups, 1, 1], dim=1)
    query, key, value = (part.reshape(-1, *fused.shape[1:]) for part in parts)
    return (query, key, value), f"{name}, interleaved by group"


def convert(source: TrainingSource) -> Conversion:
    """Convert a checkpoint of litgpt.

    Raises:
        CheckpointError: a tensor is missing or has no place in LLaMA, or a setting is one that LLaMA does not have.
    """
    reader = source.reader()
    embedding = reader.take("transformer.wte.weight")
    if "transformer.h.0.mlp.fc_1.weight" not in source.state:
        raise CheckpointError(
            f"{source.path} has no tensor transformer.h.0.mlp.fc_1.weight; litgpt's models can be imported with "
            "mlp_class_name LLaMAMLP"
        )
    config = _config(source, width=embedding.shape[1], rows=embedding.shape[0])
    tensors, origins = {"model.embed_tokens.weight": embedding}, {"model.embed_tokens.weight": "transformer.wte.weight"}
    norms: dict[str, dict[str, Tensor]] = {}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"transformer.h.{layer}", f"model.layers.{layer}"
        norms |= {f"{new}.{there}": reader.take_norm(f"{old}.{here}") for here, there in _NORMS.items()}
        for kind in ("weight", "bias"):
            found = _queries_keys_values(reader, old, kind=kind, config=config)
            if found is None and kind == "weight":
                raise CheckpointError(f"{source.path} has no tensor {old}.attn.qkv.weight")
            for part, letter in enumerate("qkv" if found is not None else ""):
                assert found is not None
                tensors[f"{new}.self_attn.{letter}_proj.{kind}"] = found[0][part]
                origins[f"{new}.self_attn.{letter}_proj.{kind}"] = f"a part of {found[1]}"
            for here, there in _LINEAR.items():
                tensor = reader.take_if_there(f"{old}.{here}.{kind}")
                if tensor is None and there.endswith("o_proj") and kind == "bias" and config["attention_bias"]:
                    tensor = torch.zeros_like(embedding[0])  # transformers has it wherever queries have one
                if tensor is not None:
                    tensors[f"{new}.{there}.{kind}"] = tensor
                    origins[f"{new}.{there}.{kind}"] = f"{old}.{here}.{kind}"
    norms["model.norm"] = reader.take_norm("transformer.ln_f")
    notes = _head(reader, embedding, config=config, tensors=tensors)
    reader.finish("litgpt's LLaMA")
    return Conversion(config, tensors, norms=norms, origins=origins, notes=notes)


def _head(
    reader: TensorReader, embedding: Tensor, *, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[str, ...]:
    head = reader.take_if_there("lm_head.weight")
    config["tie_word_embeddings"] = head is None or torch.equal(head, embedding)
    if config["tie_word_embeddings"]:
        return ("tied head: lm_head and wte are one matrix, which is stored once",)
    assert head is not None
    tensors["lm_head.weight"] = head
    return ()
