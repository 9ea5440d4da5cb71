"""Layers of one shape: latents, rotary pairs and values padded with zeros, so that one compiled graph serves all layers
and queries, keys and values are of one width, which the fastest attention wants.

A column of the expansion that is zero gives the latent's row no gradient, and the row, being zero, gives none to the
column; so it is with a pair of query and key, and with a value and its column of the output. Padding therefore stays
zero in a training without weight decay, and the padded model computes what the narrow one does.

Letters: H heads, G key groups, C latent width, P rotary width, N position-free width of a key head, V value width.
"""

from typing import Any

import torch

from ..model.attention_hf_moe import softmax_scale
from ..model.configuration_hf_moe import HfMoeConfig


def can_be_padded(config: Any) -> bool:
    """Whether a model is of ours and has layers of several shapes; not behind a norm, whose mean zeros would change."""
    if not isinstance(config, HfMoeConfig) or config.kv_a_layernorm:
        return False
    return len(set(config.latent_widths)) > 1 or len(set(config.rotary_widths)) > 1


def _sizes(config: HfMoeConfig) -> tuple[int, int, int]:
    """C, P and V of the padded layers; N + P is a multiple of 8 where frequencies are listed, and V is not below it."""
    rotary, free = max(config.rotary_widths), config.qk_nope_head_dim
    if config.rope_frequencies is not None and free % 2 == 0:
        rotary += -(free + rotary) % 8
    return max(config.latent_widths), rotary, max(config.v_head_dim, free + rotary)


def uniform_config(config: HfMoeConfig) -> HfMoeConfig:
    """The configuration with every layer as wide as the widest; added pairs rotate at the table's first frequency."""
    latent, rotary, value = _sizes(config)
    layer_types: Any = config.layer_types
    fields = config.to_dict() | {"kv_lora_rank": latent, "kv_lora_ranks": None, "v_head_dim": value}
    fields |= {"qk_rope_head_dim": rotary, "softmax_scale": softmax_scale(config, layer_types[0])}
    if config.rope_frequencies is not None:
        # A table that was as wide as its pairs had no need to say so.
        fields["rope_table_dim"] = config.head_dim
        fields["rope_frequencies"] = [[*each, *[0] * (rotary // 2 - len(each))] for each in config.rope_frequencies]
    return HfMoeConfig(**fields)


def places(config: HfMoeConfig, layer: int, projection: str) -> tuple[list[int] | None, list[int] | None]:
    """Rows and columns at which the numbers of a layer's projection stand in the padded one; None for all as they are.

    Args:
        projection: its name in the attention, such as "q_proj".
    """
    latent, rotary, value = _sizes(config)
    width, pairs = config.latent_widths[layer], config.rotary_widths[layer]
    heads, free = range(config.num_attention_heads), config.qk_nope_head_dim
    if config.rope_interleave:
        key = list(range(pairs))
    else:
        key = [half * rotary // 2 + i for half in range(2) for i in range(pairs // 2)]
    if projection in ("q_proj", "q_b_proj"):
        one = [*range(free), *(free + i for i in key)]
        return [h * (free + rotary) + i for h in heads for i in one], None
    if projection == "kv_a_proj_with_mqa":
        keys = [latent + group * rotary + i for group in range(config.num_key_value_heads) for i in key]
        return [*range(width), *keys], None
    if projection == "kv_b_proj":
        return [h * (free + value) + i for h in heads for i in range(free + config.v_head_dim)], list(range(width))
    if projection == "o_proj":
        return None, [h * value + i for h in heads for i in range(config.v_head_dim)]
    return None, None


def _split(name: str) -> tuple[int, str] | None:
    """Layer and projection of a parameter of the attention."""
    words = name.split(".")
    return (int(words[2]), words[4]) if len(words) > 4 and words[3] == "self_attn" else None


@torch.no_grad()
def padded(model: Any) -> Any:
    """A copy of an `HfMoeForCausalLM` with layers of one shape: the same logits.

    Cost: memory of a second model.
    """
    wide = type(model)(uniform_config(model.config)).to(device=model.device, dtype=model.dtype)
    wide.config._attn_implementation = model.config._attn_implementation
    wide.train(model.training)
    _transfer(model, wide, model.config, widen=True)
    return wide


@torch.no_grad()
def copy_back(wide: Any, model: Any) -> None:
    """Put the weights of a padded model into the one that it was made of."""
    _transfer(wide, model, model.config, widen=False)


def _transfer(source: Any, target: Any, config: HfMoeConfig, widen: bool) -> None:
    found = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        if (part := _split(name)) is None:
            if name.split(".")[1] != "rotary_emb":
                tensor.copy_(found[name])
            continue
        rows, columns = places(config, *part)
        wide = tensor if widen else found[name]
        index: Any = ... if rows is None else (rows,)
        if columns is not None and wide.dim() > 1:
            index = (torch.tensor(rows).unsqueeze(1) if rows else slice(None), columns)
        if widen:
            wide.zero_()
            wide[index] = found[name]
        else:
            tensor.copy_(wide[index])
