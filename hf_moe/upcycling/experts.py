"""From a dense MLP to experts: tensors to tensors.

    mlp(x) = W_down (act(W_gate x) · W_up x) = Σ_s W_down[:, s] (act(W_gate[s] x) · W_up[s] x)      s a shard of neurons

Neurons do not mix before the down-projection, so any cut of them is exact, and a scale may stand on the down-projection
only: act(s·x) is not s·act(x).

Source: arXiv:2212.05055 (copies), arXiv:2410.07524 and arXiv:2406.19384 (shards), arXiv:2502.19261 (drop).
"""

from collections.abc import Callable

import torch

from .random import generator


def copy(weight: torch.Tensor) -> torch.Tensor:
    """The rows as they are."""
    return weight


def columns(weight: torch.Tensor, *, start: int, stop: int, scale: float) -> torch.Tensor:
    """Columns `start` to `stop` of a down-projection (D, F), times `scale` in float64 when that is not 1."""
    part = weight[:, start:stop]
    return part if scale == 1.0 else part.double() * scale


def gather_rows(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of the neurons of an expert, from (F, D)."""
    return weight[index]


def gather_columns(weight: torch.Tensor, index: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Columns of the neurons of an expert, from (D, F), times `scale` as in `columns`."""
    part = weight[:, index]
    return part if scale == 1.0 else part.double() * scale


def add(weight: torch.Tensor, *, offset: float) -> torch.Tensor:
    """weight + offset, in float64: a norm that the family stores as the distance from 1."""
    return weight.double() + offset


def redraw(weight: torch.Tensor, *, dim: int, ratio: float, neurons: str, values: str) -> torch.Tensor:
    """Draw a share of the neurons anew, from a normal distribution with their own mean and deviation.

    Args:
        weight: (F, D) with dim 0 (gate, up) or (D, F) with dim 1 (down).
        ratio: share of the F neurons, rounded to whole ones.
        neurons: seed of the choice, the same for the three matrices of an expert. values: seed of the numbers.
    """
    width = weight.shape[dim]
    index = torch.randperm(width, generator=generator(neurons))[: round(ratio * width)]
    if not len(index):
        return weight
    old = weight.index_select(dim, index).float()
    new = torch.randn(old.shape, generator=generator(values)) * old.std(correction=0) + old.mean()
    return weight.clone().index_copy_(dim, index, new.to(weight.dtype))


def noise(weight: torch.Tensor, *, std: float, values: str) -> torch.Tensor:
    """weight + normal noise of `std` times the weight's deviation; `values` is the seed."""
    exact = weight.float()
    new = exact + torch.randn(weight.shape, generator=generator(values)) * (exact.std(correction=0) * std)
    return new.to(weight.dtype)


RULES: dict[str, Callable[..., torch.Tensor]] = {
    "copy": copy,
    "columns": columns,
    "gather_rows": gather_rows,
    "gather_columns": gather_columns,
    "add": add,
    "redraw": redraw,
    "noise": noise,
}
