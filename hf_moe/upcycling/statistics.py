"""What a layer's keys and values may lose: second moments on calibration text, weighted by what an error does.

An error of the layer's output is seen through random directions n: E (n · δout)² = ‖δout‖². One of them goes back
through W_o and the softmax, as a gradient would, and leaves for each score γ[m, l] = ∂(n · out[m]) / ∂score[m, l]. So

    pair j without RoPE     loss_j = E_m (Σ_h,l γ Re[q'* z (exp(i·ω·(l-m)) - c_hj)])²      c_hj by least squares
    other keys, values y    loss   = tr(S δy δy*),  S = E g g*,  g what reaches them from n
                            K = E w (y - mean)(y - mean)*,  w = g* S⁻¹ g: tokens that matter, such as the first

A constant error of a key moves all scores alike and does nothing; one of a value becomes a bias of the output: so
moments are taken around the mean.

Letters: S tokens of a sequence, T of all, H heads, G key groups, F frequencies, J = F·G pairs, V value width,
Y = 2·J + G·V numbers that a latent may hold.
Source: probing with random directions, Hutchinson (1989); the rest is this project's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .rotation import Rotation, as_pairs, gather, interleaved, unrotated

# A token may weigh so much more than the average one.
_MOST = 1e4
_RIDGE = 1e-6
# Numbers of one intermediate (H, S, pairs) that are in memory at once.
_AT_ONCE = 1 << 20


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


@dataclass(frozen=True)
class Reader:
    """A layer's text, one sequence at a time, as often as it is asked for.

    Attributes:
        sequences: how many.
        project: of sequence b the query (S, H·2F) and key (S, G·2F) before RoPE, the value (S, G·V), and a random
            direction of the output, through W_o: (S, H·V).
        attend: of sequence b, the weights (H, S, S); those that say how they answer to an error; and the derivative of
            the capped score by the plain product q · k.
        phase: (S, F) complex, what RoPE multiplies by; its size is the square root of a scale of the scores.
    """

    sequences: int
    project: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    attend: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    phase: torch.Tensor


def measure(heads: Heads, reader: Reader, rotate: bool = True) -> Statistics:
    """The statistics of one layer.

    Args:
        rotate: False leaves every head by itself.
    Cost: 16·T·S·H·J FLOPs; memory of a few times 4·H·S² bytes, 4·T·Y for what reaches the keys and values, and
        40·Y².
    """
    device, frequencies = reader.phase.device, reader.phase.shape[1]
    rotation = unrotated(frequencies, heads.groups, device)
    if rotate and heads.keys:
        rotation = gather(*_energies(heads, reader))
    turned = _Turned(heads, rotation, reader)
    for b in range(reader.sequences):
        turned.add(b)
    turn_HJ = turned.turn()
    reached = [turned.reached(b, turn_HJ) for b in range(reader.sequences)]

    def numbers(b: int) -> torch.Tensor:
        _, key, value, _ = reader.project(b)
        y = value.double()
        return torch.cat([interleaved(turned.pairs(key)), y], dim=-1) if heads.keys else y

    covariance, metric, mean = _moments(numbers, reached)
    return Statistics(rotation, turn_HJ, turned.loss(turn_HJ), covariance, metric, mean)


def _energies(heads: Heads, reader: Reader) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys' covariance and queries' energy by group, (F, G, G)."""
    device, frequencies, tokens = reader.phase.device, reader.phase.shape[1], 0
    square = torch.zeros(frequencies, heads.groups, heads.groups, dtype=torch.complex128, device=device)
    total, energy = torch.zeros_like(square[..., 0]), torch.zeros(heads.heads, frequencies, device=device).double()
    for b in range(reader.sequences):
        query, key, _, _ = reader.project(b)
        pairs = as_pairs(key.double(), heads.groups)
        square += torch.einsum("sgf,shf->fgh", pairs, pairs.conj())
        total += pairs.sum(0).T
        energy += as_pairs(query.double(), heads.heads).abs().square().sum(0)
        tokens += len(key)
    mean = total / tokens
    covariance = square / tokens - mean[:, :, None] * mean[:, None].conj()
    by_group = (energy / tokens).unflatten(0, (heads.groups, -1)).sum(1)
    return covariance, torch.diag_embed(by_group.T).to(torch.complex128)


class _Turned:
    """What pairs without RoPE do to the scores, and from where errors come back to them.

    With a = γ q'* z exp(iω(l-m)) and f = γ q'* z, summed over l, the Gram matrix of [Σ_h a ; f_1 … f_H] over the
    queries m gives c and the losses: all that has to be kept of the text.
    """

    def __init__(self, heads: Heads, rotation: Rotation, reader: Reader):
        self.heads, self.rotation, self.reader = heads, rotation, reader
        device = reader.phase.device
        self.group = heads.group.to(device)
        count = rotation.shape[0] * heads.groups if heads.keys else 0
        self.frequency_J = torch.arange(count, device=device) // heads.groups
        self.factor_HJ = rotation.out[:, self.group].conj().transpose(0, 1).flatten(1)
        self.gram_JXX = torch.zeros(count, 1 + 2 * heads.heads, 1 + 2 * heads.heads, dtype=torch.float64, device=device)
        self.right_HJ2 = torch.zeros(heads.heads, count, 2, dtype=torch.float64, device=device)
        self.tokens = 0

    def pairs(self, key: torch.Tensor) -> torch.Tensor:
        """z of keys (S, G·2F): (S, J) complex."""
        return torch.einsum("fjg,sgf->sfj", self.rotation.into, as_pairs(key.double(), self.heads.groups)).flatten(1)

    def add(self, b: int) -> None:
        """Sum up one sequence."""
        query, key, value, back = self.reader.project(b)
        self.tokens += len(key)
        if not self.heads.keys:
            return
        gamma, _ = self._back_to_scores(b, value, back)
        z_SJ = self.pairs(key).to(torch.complex64)
        for some, seen in self._seen(query):
            phase = self.reader.phase[:, self.frequency_J[some]].to(torch.complex64)
            both = torch.view_as_real(torch.cat([z_SJ[:, some] * phase, z_SJ[:, some]], dim=1)).flatten(1)
            met = torch.view_as_complex(torch.einsum("hml,lx->hmx", gamma, both).unflatten(-1, (-1, 2)).contiguous())
            with_rope, without = (seen.conj() * part for part in met.chunk(2, dim=-1))
            with_rope = (with_rope * phase.conj()).real
            # Re(c f) = c_r f_r - c_i f_i
            features = torch.stack([without.real, -without.imag], dim=-1)
            self.right_HJ2[:, some] += torch.einsum("hmjx,hmj->hjx", features, with_rope).double()
            all_JSX = torch.cat([with_rope.sum(0).T[..., None], features.permute(2, 1, 0, 3).flatten(2)], dim=2)
            self.gram_JXX[some] += torch.einsum("jsx,jsy->jxy", all_JSX.double(), all_JSX.double())

    def _back_to_scores(self, b: int, value: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """γ (H, S, S), and what reaches the values (S, G·V)."""
        weights, broad, slope = self.reader.attend(b)
        back_heads = back.unflatten(-1, (self.heads.heads, -1))
        reached = torch.einsum("hml,mhd->lhd", weights, back_heads).unflatten(1, (self.heads.groups, -1)).sum(2)
        value_heads = value.unflatten(-1, (self.heads.groups, -1))[:, self.group]
        back_weights = torch.einsum("mhd,lhd->hml", back_heads, value_heads)
        back_weights -= (broad * back_weights).sum(-1, keepdim=True)
        return back_weights.mul_(broad).mul_(slope), reached.flatten(1)

    def _seen(self, query: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some pairs at a time, and the queries that meet them: q' (H, S, pairs)."""
        queries = as_pairs(query.double(), self.heads.heads).transpose(0, 1)
        step = max(1, _AT_ONCE // (queries.shape[0] * queries.shape[1]))
        for start in range(0, len(self.frequency_J), step):
            some = slice(start, start + step)
            yield some, (queries[..., self.frequency_J[some]] * self.factor_HJ[:, None, some]).to(torch.complex64)

    def turn(self) -> torch.Tensor:
        """c (H, J), at most as large as the rotation that it stands for, up to the scale of RoPE."""
        blocks = self.gram_JXX[:, 1:, 1:].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        normal = blocks.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        size = normal.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(2, dtype=torch.float64, device=size.device)
        c = torch.linalg.solve(normal + eye * (size * _RIDGE + 1e-300), self.right_HJ2.unsqueeze(-1)).squeeze(-1)
        return torch.view_as_complex(c.contiguous())

    def loss(self, turn_HJ: torch.Tensor) -> torch.Tensor:
        """Σ_m (Σ_h a - Σ_h Re(c_h f_h))² / T of each pair."""
        c_JX = torch.view_as_real(turn_HJ).transpose(0, 1).flatten(1)
        direction = torch.cat([c_JX.new_ones(len(c_JX), 1), -c_JX], dim=1)
        return torch.einsum("jx,jxy,jy->j", direction, self.gram_JXX, direction).clamp_min(0) / self.tokens

    def reached(self, b: int, turn_HJ: torch.Tensor) -> torch.Tensor:
        """What reaches the pairs without RoPE, derivatives by real and imaginary parts, and the values: (S, Y)."""
        query, _, value, back = self.reader.project(b)
        gamma, values = self._back_to_scores(b, value, back)
        found = []
        for some, seen in self._seen(query) if self.heads.keys else ():
            met = torch.view_as_real((seen.conj() * turn_HJ[:, None, some].to(seen.dtype)).resolve_conj()).flatten(-2)
            keys = torch.einsum("hml,hmx->lx", gamma, met).unflatten(-1, (-1, 2))
            found.append((keys * keys.new_tensor([1.0, -1.0])).flatten(-2))
        return torch.cat([*found, values], dim=-1)


def _moments(
    numbers: Callable[[int], torch.Tensor], reached: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, S and the weighted mean.

    Args:
        numbers: y of sequence b, (S, Y) in float64. reached: g of each, float32.
    """
    tokens = sum(map(len, reached))
    metric = sum_of(back.double().T @ back.double() for back in reached) / tokens
    eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    whitening = torch.linalg.lu_factor(metric + eye * (metric.diagonal().mean() * 1e-3 + 1e-300))
    weights = []
    for back in reached:
        whitened = torch.linalg.lu_solve(*whitening, back.double().T)
        weights.append((whitened.T * back).sum(1) / len(metric))
    most = float(torch.cat(weights).mean()) * _MOST
    weights = [weight.clamp(max=most) for weight in weights]
    whole = sum_of(weight.sum() for weight in weights)
    mean = sum_of((weight[:, None] * numbers(b)).sum(0) for b, weight in enumerate(weights)) / whole

    def spread(b: int, weight: torch.Tensor) -> torch.Tensor:
        centred = numbers(b) - mean
        return (centred * weight[:, None]).T @ centred

    return sum_of(spread(b, weight) for b, weight in enumerate(weights)) / whole, metric, mean


def sum_of(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """Sum in the first part's memory."""
    total = next(parts).clone()
    for part in parts:
        total += part
    return total
