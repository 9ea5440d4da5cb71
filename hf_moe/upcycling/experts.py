"""From a dense MLP to experts: tensors to tensors.

    mlp(x) = W_down (act(W_gate x) · W_up x) = Σ_s W_down[:, s] (act(W_gate[s] x) · W_up[s] x)      s a shard of neurons

Neurons do not mix before the down-projection, so any cut of them is exact, and a scale may stand on the down-projection
only: act(s·x) is not s·act(x).

Source: arXiv:2212.05055 (copies), arXiv:2410.07524 and arXiv:2406.19384 (shards).
"""

from collections.abc import Callable

import torch


def copy(weight: torch.Tensor) -> torch.Tensor:
    """The rows as they are."""
    return weight


def columns(weight: torch.Tensor, *, start: int, stop: int, scale: float) -> torch.Tensor:
    """Columns `start` to `stop` of a down-projection (D, F), times `scale` in float64 when that is not 1."""
    part = weight[:, start:stop]
    return part if scale == 1.0 else part.double() * scale


def add(weight: torch.Tensor, *, offset: float) -> torch.Tensor:
    """weight + offset, in float64: a norm that the family stores as the distance from 1."""
    return weight.double() + offset


RULES: dict[str, Callable[..., torch.Tensor]] = {"copy": copy, "columns": columns, "add": add}
