"""A compressed layer's queries through a bottleneck of R numbers, in closed form; float64.

    q = W x~        a = Uᵀ Lᵀ W x~        q̂ = L⁻ᵀ U a        x~ = x with a 1 behind: a bias is one more column of W

    S = L Lᵀ = E g g*,  g = ∂(n · out)/∂q = J* Σ_l γ[m, l] key[l]        K = E x~ x~*
    U the first R left singular vectors of Lᵀ W M, K = M Mᵀ

A query is there for its scores with keys, and scores for the output. A random direction n of the output, E (n · δout)²
= ‖δout‖², comes back to the scores as γ (see `statistics`), and from them to the query through the keys that it meets:
latent ones, and rotary ones turned by their distance, as J*, the derivative of RoPE and of the queries' norm, puts
them. Of all factorisations of rank R this one has the least E (g · δq)² where g and x are independent: tr(S δW K δW*),
the sum of the other singular values' squares. At rank min(D + 1, Q) nothing is lost.

Letters: S tokens of a sequence, D hidden, H heads, V value width, Q = H·2F numbers of the source's query, R rank.
Source: Eckart and Young (1936), weighted; probing with random directions, Hutchinson (1989).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..model.attention_hf_moe import HfMoeAttention
from .random import Draws
from .source_attention import projected, weights_at
from .threads import one_thread

_RIDGE = 1e-6


@dataclass(frozen=True)
class Bottleneck:
    """a = project q and q̂ = expand a; `tail` is the loss, in squares of the layer's output."""

    project: torch.Tensor
    expand: torch.Tensor
    tail: float


def narrow(weight: torch.Tensor, inputs: torch.Tensor, metric: torch.Tensor, rank: int) -> Bottleneck:
    """The best bottleneck of a rank.

    Args:
        weight: W (Q, D + 1). inputs: K. metric: S. All of them in float64; the last two with a ridge of 1e-6.
    Cost: 20·Q³ FLOPs.
    """
    lower = torch.linalg.cholesky(_ridged(metric))
    weighted = lower.T @ weight @ torch.linalg.cholesky(_ridged(inputs))
    # At a layer's size the processor is quicker than a GPU.
    with one_thread():
        vectors, values, _ = torch.linalg.svd(weighted.cpu(), full_matrices=False)
    vectors = vectors[:, :rank].to(weight.device)
    expand = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    # Numbers of about the queries' own size, for 16-bit weights.
    size = expand.norm(dim=0)
    tail = float(values[rank:].square().sum())
    return Bottleneck(size[:, None] * (lower @ vectors).T, expand / size, tail)


def _ridged(moments: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return moments + eye * (moments.diagonal().mean() * _RIDGE + 1e-300)


def query_moments(
    attention: HfMoeAttention,
    rows: torch.Tensor,
    inputs: Iterable[torch.Tensor],
    rope: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    seed: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and S of a layer on text.

    Args:
        attention: the compressed layer, with its full query projection. rows: (Q', Q), its queries of the source's.
        inputs: what it reads, one tensor (1, S, D) for each sequence. rope, mask: of all sequences.
    Cost: 10·S²·H·V FLOPs a sequence; memory of a few times 4·H·S² bytes and of 24·Q².
    """
    directions, tokens = Draws(seed), 0
    metric, moments = (rows.new_zeros(size, size) for size in (rows.shape[1], attention.q_proj.in_features + 1))
    for b, x in enumerate(inputs):
        g = _reached(attention, x, rope, mask, directions.draw(b, x[0].shape).to(x)).double() @ rows
        with_one = torch.cat([x[0], x.new_ones(x.shape[1], 1)], dim=1).double()
        metric += g.T @ g
        moments += with_one.T @ with_one
        tokens += len(g)
    return moments / tokens, metric / tokens


def _reached(
    attention: HfMoeAttention,
    x: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    noise: torch.Tensor,
) -> torch.Tensor:
    """g of the layer's own projected queries, (S, Q'), for one direction n at each of a sequence's tokens, (S, D)."""
    _, broad, slope = weights_at(attention, x, rope, mask)
    _, key, value = projected(attention, x, rope)
    back = (noise @ attention.o_proj.weight).unflatten(-1, (-1, attention.v_head_dim))
    gamma = torch.einsum("mhd,hld->hml", back, value[0])
    gamma -= (broad * gamma).sum(-1, keepdim=True)
    gamma.mul_(broad).mul_(slope)
    with torch.enable_grad():
        query = attention.q_proj(x).detach().requires_grad_()
        rotated = attention.rotated_query(query, *rope)
        (found,) = torch.autograd.grad(rotated, query, (gamma @ key[0])[None])
    return found[0]
