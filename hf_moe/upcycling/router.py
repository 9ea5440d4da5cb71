"""First weights of the routers.

With copies, any router is exact: normalised weights of equal experts sum to 1. So it is with shards where the copies of
each are a group that gives as many experts and has weights of its own. Without groups the copies come in sets (expert e
is shard e mod R of set e ÷ R), and all members of a set have the same row: the top K are then whole sets, so that every
token meets every shard with a total weight of 1.

Source: arXiv:2410.07524 section 3.2 (the same row for a set).
"""

from collections.abc import Callable

import torch

from .random import generator


def router_random(*, shape: tuple[int, ...], repeats: int, std: float, seed: str) -> torch.Tensor:
    """Rows (E, D) from a normal distribution, each repeated for the `repeats` shards of its set."""
    sets = torch.randn(shape[0] // repeats, shape[1], generator=generator(seed)) * std
    return sets.repeat_interleave(repeats, dim=0)


def router_zero(*, shape: tuple[int, ...], repeats: int, std: float, seed: str) -> torch.Tensor:
    """Zeros (E, D)."""
    return torch.zeros(shape)


def calibrated(weight: torch.Tensor) -> torch.Tensor:
    """Rows (E, D) that were learnt from text."""
    return weight


RULES: dict[str, Callable[..., torch.Tensor]] = {
    "router_random": router_random,
    "router_zero": router_zero,
    "calibrated": calibrated,
}
