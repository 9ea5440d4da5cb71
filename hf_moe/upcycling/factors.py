"""The tensors of a compressed layer, in closed form from its statistics; float64.

    y = [pairs that lose RoPE ; values] = W x + b        c = Uᵀ Lᵀ W x  (cached)        ŷ = L⁻ᵀ U c + constant

with S = L Lᵀ the metric of y and U the first C eigenvectors of Lᵀ K L: of all factorisations of rank C the one with the
least tr(S δy δyᵀ), which is the sum of the other eigenvalues. Keys and values are balanced by S, which knows both.

Letters: D hidden, H heads, G key groups, J rotary pairs, V value width, C latent width, Y numbers of y.
Source: Eckart and Young (1936), weighted.
"""

from dataclasses import dataclass

import torch

from .budget import Candidate
from .rotation import as_halves, counter_rotated, interleaved, shared_keys
from .statistics import Heads, Statistics
from .threads import one_thread

_RIDGE = 1e-6
# Modules of the target's attention whose tensors have no bias as a last column.
WITHOUT_BIAS = ("kv_b_proj", "q_b_proj")


@dataclass(frozen=True)
class Weights:
    """A source layer's projections, (rows, D + 1) in float64: the last column is the bias, zeros where it has none."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Latent:
    """The latent of one width: c = project y and ŷ = expand c, both of y's numbers at `index`; `tail` is the loss."""

    index: torch.Tensor
    project: torch.Tensor
    expand: torch.Tensor
    tail: float


def by_loss(statistics: Statistics) -> torch.Tensor:
    """Pairs in the order in which they should stay rotary."""
    return statistics.without_rope_J.argsort(descending=True, stable=True)


def _weighted(statistics: Statistics, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places in y of what goes into the latent when `kept` pairs stay rotary, L and Lᵀ K L."""
    stays = torch.ones(len(statistics.mean_Y), dtype=torch.bool, device=kept.device)
    stays[2 * kept], stays[2 * kept + 1] = False, False
    index = stays.nonzero()[:, 0]
    metric = statistics.metric_YY[index][:, index]
    eye = torch.eye(len(index), dtype=metric.dtype, device=metric.device)
    lower = torch.linalg.cholesky(metric + eye * (metric.diagonal().mean() * _RIDGE + 1e-300))
    return index, lower, lower.T @ statistics.covariance_YY[index][:, index] @ lower


def factor(statistics: Statistics, kept: torch.Tensor, latent: int) -> Latent:
    """The best latent of a width; its tail is the sum of the eigenvalues left out."""
    index, lower, moments = _weighted(statistics, kept)
    # At a layer's size the processor is quicker than a GPU.
    with one_thread():
        values, vectors = torch.linalg.eigh(moments.cpu())
    vectors = vectors[:, len(vectors) - latent :].flip(1).to(lower.device)
    expand = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    tail = float(values[: len(values) - latent].clamp_min(0).sum())
    return Latent(index, (lower @ vectors).T, expand, tail)


def candidates(statistics: Statistics, fixed: int, wanted: int | None = None) -> list[Candidate]:
    """Every latent width with each of some numbers of rotary pairs, `wanted` among them.

    Args:
        fixed: cached numbers that always stay.
    """
    order, found = by_loss(statistics), []
    for count in sorted({*_counts(len(order)), *(() if wanted is None else (wanted,))}):
        with one_thread():
            values = torch.linalg.eigvalsh(_weighted(statistics, order[:count])[2].cpu()).flip(0).clamp_min(0)
        tail = (values.sum() - values.cumsum(0)).clamp_min(0)
        loss = (tail + float(statistics.without_rope_J[order[count:]].sum())).tolist()
        found += [Candidate(fixed + 2 * count + c, count, c, each) for c, each in enumerate(loss, 1)]
    return found


def _counts(pairs: int) -> list[int]:
    """Numbers of rotary pairs to try: dense where few, 1.4 times more each where many; none where there are none."""
    found = [min(pairs, 1)]
    while found[-1] < pairs:
        found.append(min(pairs, max(found[-1] + 1, int(found[-1] * 1.4))))
    return found


def compress_layer(
    heads: Heads, weights: Weights, statistics: Statistics, kept: torch.Tensor, latent: Latent
) -> dict[str, torch.Tensor]:
    """Modules of the target's attention → tensors, biases as a last column but for `WITHOUT_BIAS`.

    Args:
        kept: rotary pairs, in the order of the rotary key.
    """
    group = heads.group.to(kept.device)
    source = latent_rows(heads, weights, statistics)[latent.index]
    down = latent.project @ source
    up = down.new_zeros(len(statistics.mean_Y), len(down))
    up[latent.index] = latent.expand
    # mean + Π (b - mean): the constant part, less what the latent has of it. Of keys it does nothing.
    mean = statistics.mean_Y[latent.index]
    constant = mean.new_zeros(len(statistics.mean_Y))
    constant[latent.index] = mean + latent.expand @ (latent.project @ (source[:, -1] - mean))
    down[:, -1] = 0

    pairs = len(statistics.without_rope_J)
    value_up = up[2 * pairs :].unflatten(0, (heads.groups, -1))[group]
    value_constant = constant[2 * pairs :].unflatten(0, (heads.groups, -1))[group].flatten()
    if heads.keys:
        key_up = torch.complex(up[: 2 * pairs : 2], up[1 : 2 * pairs : 2]).unflatten(0, statistics.rotation.shape)
        turn = statistics.turn_HJ.unflatten(1, statistics.rotation.shape)
        key_up = torch.einsum("fhj,hfj,fjc->hfc", statistics.rotation.out[:, group], turn, key_up)
        value_up = torch.cat([key_up.real, key_up.imag, value_up], dim=1)
        key = as_halves(shared_keys(statistics.rotation, weights.key)[kept])
    else:
        key = weights.key
    output = weights.output.clone()
    output[:, -1] += output[:, :-1] @ value_constant
    down = torch.cat([down, key])
    return {
        "q_proj": query_rows(heads, statistics, kept, weights.query),
        "kv_a_proj_with_mqa": down,
        "kv_b_proj": value_up.flatten(0, 1),
        "o_proj": output,
    }


def query_rows(heads: Heads, statistics: Statistics, kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (H·(N + P), …) of the target's queries from those of the source (H·2F, …): linear, head by head."""
    if not heads.keys:
        return rows
    free, rotary = rows.unflatten(0, (heads.heads, -1)), counter_rotated(statistics.rotation, rows, heads.heads, kept)
    return torch.cat([free, rotary], dim=1).flatten(0, 1)


def latent_rows(heads: Heads, weights: Weights, statistics: Statistics) -> torch.Tensor:
    """Rows W, b that give y: pairs, real and imaginary side by side, then values."""
    if not heads.keys:
        return weights.value
    return torch.cat([interleaved(shared_keys(statistics.rotation, weights.key).T).T, weights.value])


def refit(output: torch.Tensor, normal: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    """W_o and its bias (D, H·V + 1) that give the wanted output: least squares, drawn towards the present one.

    Args:
        normal: Σ a aᵀ of the heads' outputs a with a 1 behind. right: Σ a (wanted - output a)ᵀ.
    """
    eye = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    return output + torch.linalg.solve(normal + eye * (normal.diagonal().mean() * ridge + 1e-300), right).T
