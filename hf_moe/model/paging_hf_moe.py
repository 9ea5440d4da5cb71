"""Latents in the paged cache of Transformers' continuous batching, which knows keys and values of one width only.

Letters: C latent width, G key groups, P rotary width, L cached length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .configuration_hf_moe import HfMoeConfig


def half_width(config: HfMoeConfig) -> int:
    """Numbers a token in each of the cache's two tensors: half of the widest layer's C + G·P, rounded up."""
    return (max(config.cache_widths) + 1) // 2


@contextmanager
def sized_for_latents(config: HfMoeConfig) -> Iterator[None]:
    """While the cache is made, the configuration names the sizes that it shall have."""
    own = config.num_key_value_heads, config.head_dim
    config.num_key_value_heads, config.head_dim = 1, half_width(config)
    try:
        yield
    finally:
        config.num_key_value_heads, config.head_dim = own


def update_paged(
    cache: Any,
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    layer_idx: int,
    half: int,
    kwargs: dict[str, Any],
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any] | None]:
    """Store this step's latents (1, 1, S, C) and rotary keys (1, 1, S, G·P); return those of all L positions read.

    Their concatenation is stored in two halves. `kwargs` is what the cache gave the model; it is updated in place.

    Args:
        in_place: for a kernel that tells sequences apart, and reads pages where they are.
    Returns:
        latents (1, 1, L, C), rotary keys (1, 1, L, G·P) and, in place, where each sequence begins, under the names of
        `kernels.latent_decode.latent_decode_packed`. With `slot_L` there, the pages' two halves (slots, half) instead.
    """
    widths = [latent.shape[-1], k_rot.shape[-1], 2 * half - latent.shape[-1] - k_rot.shape[-1]]
    packed = nn.functional.pad(torch.cat((latent, k_rot), dim=-1), (0, widths[-1]))
    allocator, read_index = cache.layer_to_allocator[layer_idx], kwargs["read_index"]
    slots = read_index[allocator.index]
    # A ring of pages is read before it is written over: the cache gathers it, which is no more than a window.
    in_pages = in_place and allocator.supports_block_table and slots.numel() > 0
    if in_pages:
        # Nothing to read: the cache only writes.
        kwargs["read_index"] = [slots[:0]] * len(read_index)
    first, second = cache.update(packed[..., :half], packed[..., half:], layer_idx, kwargs)
    pages = None
    if in_place:
        pages = {
            "query_start": kwargs["cu_seq_lens_q"],
            "key_start": kwargs["cu_seq_lens_k"],
            "longest_query": kwargs["max_length_q"],
            "longest_key": kwargs["max_length_k"],
        }
    if in_pages:
        assert pages is not None
        pages |= {"slot_L": slots, "latent_width": widths[0], "rotary_width": widths[1]}
        halves = allocator.get_cache_for_block_table(layer_idx)
        return halves[0].view(-1, half), halves[1].view(-1, half), pages
    latent, k_rot, _ = torch.cat((first, second), dim=-1).split(widths, dim=-1)
    return latent, k_rot, pages
