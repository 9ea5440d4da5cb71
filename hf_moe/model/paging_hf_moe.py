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
    cache: Any, latent: torch.Tensor, k_rot: torch.Tensor, layer_idx: int, half: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store this step's latents (1, 1, S, C) and rotary keys (1, 1, S, G·P); return those of all L positions read.

    Their concatenation is stored in two halves. `kwargs` is what the cache gave the model; it is updated in place.
    """
    width = latent.shape[-1] + k_rot.shape[-1]
    packed = nn.functional.pad(torch.cat((latent, k_rot), dim=-1), (0, 2 * half - width))
    first, second = cache.update(packed[..., :half], packed[..., half:], layer_idx, kwargs)
    latent, k_rot, _ = torch.cat((first, second), dim=-1).split(
        [latent.shape[-1], k_rot.shape[-1], 2 * half - width], dim=-1
    )
    return latent, k_rot
