"""What a layer's keys and values may lose: second moments on calibration text, weighted by what an error does.

An error of the layer's output is seen through random directions n: E (n · δout)² = ‖δout‖². One of them goes back
through W_o and the softmax, as a gradient would, and leaves for each score γ[m, l] = ∂(n · out[m]) / ∂score[m, l]. So

    pair j without RoPE     loss_j = E_m (Σ_h,l γ Re[q'* z (exp(i·ω·(l-m)) - c_hj)])²      c_hj by least squares
    other keys, values y    loss   = tr(S δy δy*),  S = E g g*,  g what reaches them from n
                            K = E w (y - mean)(y - mean)*,  w = g* S⁻¹ g: tokens that matter, such as the first

A constant error of a key moves all scores alike and does nothing; one of a value becomes a bias of the output: so
moments are taken around the mean.

Letters: B sequences, S tokens of one, H heads, G key groups, F frequencies, J = F·G pairs, V value width,
Y = 2·J + G·V numbers that a latent may hold.
Source: probing with random directions, Hutchinson (1989); the rest is this project's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .rotation import Rotation, as_pairs, gather, interleaved, unrotated

# A token may weigh so much more than the average one.
_MOST = 1e4
_RIDGE = 1e-6


@dataclass(frozen=True)
class Heads:
    """Sizes of a source's attention: H, G, and whether its keys may be compressed."""

    heads: int
    groups: int
    keys: bool

    @property
    def group(self) -> torch.Tensor:
        """Key group of each head."""
        return torch.arange(self.heads) * self.groups // self.heads


@dataclass(frozen=True)
class Statistics:
    """See the module; float64.

    rotation: of the keys' pairs. turn_HJ: c, complex, what stands in for RoPE. without_rope_J: loss of a pair that
    loses it. covariance_YY, metric_YY, mean_Y: K, S and mean of pairs (real and imaginary side by side) and values.
    """

    rotation: Rotation
    turn_HJ: torch.Tensor
    without_rope_J: torch.Tensor
    covariance_YY: torch.Tensor
    metric_YY: torch.Tensor
    mean_Y: torch.Tensor


def measure(
    heads: Heads,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    back: torch.Tensor,
    phase: torch.Tensor,
    attend: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    rotate: bool = True,
) -> Statistics:
    """The statistics of one layer.

    Args:
        query: (B, S, H·2F), key: (B, S, G·2F), before RoPE. value: (B, S, G·V).
        back: (B, S, H·V), a random direction of the output, through W_o.
        phase: (S, F) complex, what RoPE multiplies by; its size is the square root of a scale of the scores.
        attend: of sequence b, the weights (H, S, S); those that say how they answer to an error; and the derivative of
            the capped score by the plain product q · k.
        rotate: False leaves every head by itself.
    Cost: 12·B·S²·H·J FLOPs; memory of 4·B·H·S·(S + 5·J) bytes.
    """
    device, (b_size, s_size) = key.device, key.shape[:2]
    group = heads.group.to(device)
    pairs, queries = as_pairs(key.double(), heads.groups), as_pairs(query.double(), heads.heads)
    frequencies = pairs.shape[-1]
    rotation = unrotated(frequencies, heads.groups, device)
    if rotate:
        rotation = gather(*_energies(pairs, queries, heads))
    z = torch.einsum("fjg,bsgf->bsfj", rotation.into, pairs).flatten(2) if heads.keys else pairs[..., :0, 0]
    factor_HJ = rotation.out[:, group].conj().transpose(0, 1).flatten(1)
    repeated = torch.arange(z.shape[-1], device=device) // heads.groups
    phase_SJ = phase[:, repeated].to(torch.complex64)

    value_heads, back_heads = value.unflatten(-1, (heads.groups, -1)), back.unflatten(-1, (heads.heads, -1))
    sums = _TurnSums(heads.heads, z.shape[-1], device)
    gammas, values_back, queries_seen = [], [], []
    for b in range(b_size):
        weights, broad, slope = attend(b)
        back_weights = torch.einsum("mhd,lhd->hml", back_heads[b], value_heads[b][:, group])
        gamma = broad * (back_weights - (broad * back_weights).sum(-1, keepdim=True)) * slope
        reached = torch.einsum("hml,mhd->lhd", weights, back_heads[b]).unflatten(1, (heads.groups, -1)).sum(2)
        values_back.append(reached.flatten(1))
        if heads.keys:
            seen = (queries[b].transpose(0, 1)[..., repeated] * factor_HJ[:, None]).to(torch.complex64)
            sums.add(gamma, seen, z[b].to(torch.complex64), phase_SJ)
            gammas.append(gamma)
            queries_seen.append(seen)
    turn_HJ = sums.turn()
    y, back_y = value.double(), torch.stack(values_back).double()
    if heads.keys:
        y = torch.cat([interleaved(z), y], dim=-1)
        keys_back = torch.stack(
            [_pairs_back(gamma, seen, turn_HJ) for gamma, seen in zip(gammas, queries_seen, strict=True)]
        )
        back_y = torch.cat([keys_back, back_y], dim=-1)
    covariance, metric, mean = _moments(y.flatten(0, 1), back_y.flatten(0, 1))
    return Statistics(rotation, turn_HJ, sums.loss(turn_HJ, b_size * s_size), covariance, metric, mean)


def _energies(pairs: torch.Tensor, queries: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys' covariance and queries' energy by group, (F, G, G)."""
    centred = pairs - pairs.mean((0, 1))
    covariance = torch.einsum("bsgf,bshf->fgh", centred, centred.conj()) / (pairs.shape[0] * pairs.shape[1])
    energy = queries.abs().square().mean((0, 1)).unflatten(0, (heads.groups, -1)).sum(1)
    return covariance, torch.diag_embed(energy.T).to(torch.complex128)


class _TurnSums:
    """Sums over queries m from which c and the losses follow: of a = γ q'* z exp(iω(l-m)) and b = γ q'* z over l."""

    def __init__(self, heads: int, pairs: int, device: torch.device):
        self.normal = torch.zeros(heads, pairs, 2, 2, dtype=torch.float64, device=device)
        self.right = torch.zeros(heads, pairs, 2, dtype=torch.float64, device=device)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, gamma: torch.Tensor, seen: torch.Tensor, z_SJ: torch.Tensor, phase_SJ: torch.Tensor) -> None:
        both = torch.view_as_real(torch.cat([z_SJ * phase_SJ, z_SJ], dim=1)).flatten(1)
        met = torch.view_as_complex(torch.einsum("hml,lx->hmx", gamma, both).unflatten(-1, (-1, 2)).contiguous())
        with_rope, without = (seen.conj() * part for part in met.chunk(2, dim=-1))
        with_rope = (with_rope * phase_SJ.conj()).real
        # Re(c b) = c_r b_r - c_i b_i
        features = torch.stack([without.real, -without.imag], dim=-1)
        self.normal += torch.einsum("hmjx,hmjy->hjxy", features, features).double()
        self.right += torch.einsum("hmjx,hmj->hjx", features, with_rope).double()
        self.kept.append((with_rope, features))

    def turn(self) -> torch.Tensor:
        """c (H, J), at most as large as the rotation that it stands for, up to the scale of RoPE."""
        size = self.normal.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(2, dtype=torch.float64, device=size.device)
        c = torch.linalg.solve(self.normal + eye * (size * _RIDGE + 1e-300), self.right.unsqueeze(-1)).squeeze(-1)
        return torch.view_as_complex(c.contiguous())

    def loss(self, turn_HJ: torch.Tensor, tokens: int) -> torch.Tensor:
        c = torch.view_as_real(turn_HJ).float()[:, None]
        total = torch.zeros(turn_HJ.shape[1], dtype=torch.float64, device=turn_HJ.device)
        for with_rope, features in self.kept:
            total += (with_rope - (features * c).sum(-1)).sum(0).double().square().sum(0)
        return total / tokens


def _pairs_back(gamma: torch.Tensor, seen: torch.Tensor, turn_HJ: torch.Tensor) -> torch.Tensor:
    """What reaches the pairs without RoPE, (S, 2·J): derivatives by real and imaginary parts."""
    met = torch.view_as_real((seen.conj() * turn_HJ[:, None].to(seen.dtype)).resolve_conj()).flatten(-2)
    back = torch.einsum("hml,hmx->lx", gamma, met).double().unflatten(-1, (-1, 2))
    return (back * back.new_tensor([1.0, -1.0])).flatten(-2)


def _moments(y: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, S and the weighted mean."""
    metric = back.T @ back / len(back)
    eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    whitened = torch.linalg.solve(metric + eye * (metric.diagonal().mean() * 1e-3 + 1e-300), back.T)
    weight = (whitened.T * back).sum(1) / len(metric)
    weight = weight.clamp(max=float(weight.mean()) * _MOST)
    weight = weight / weight.mean()
    mean = (weight[:, None] * y).mean(0)
    centred = y - mean
    return (centred * weight[:, None]).T @ centred / len(y), metric, mean
