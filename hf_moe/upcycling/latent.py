"""Grouped-query attention as latent attention, exactly: the tensors of one layer.

    latent  c = [W_v x ; W_kn x]         C = G·(V + N)        rotary keys  k_g = rope(W_kr,g x)
    value of head h   = c's block of group g(h)                 W_uv,h selects it: zeros and ones
    key of head h     = [c's position-free block of g(h) ; k_g(h)]

N is 0 unless the family rotates a part of each head only (partial rotary, as in some Phi-3 models). The value's bias
becomes one of the output, since softmax weights sum to 1.

Letters: D hidden, H heads, G key groups, C latent width, P rotary width, N position-free width, V value width.
Source: arXiv:2405.04434 section 2.1 for the target, arXiv:2305.13245 for the source; the embedding is this project's.
"""

from collections.abc import Callable

import torch


def latent_and_keys(v: torch.Tensor, k: torch.Tensor, *, groups: int, nope: int) -> torch.Tensor:
    """`kv_a_proj_with_mqa`: rows of the latent, then of the rotary keys.

    Args:
        v: (G·V, D). k: (G·(P + N), D), the rotated part of each head first.
    Returns:
        (G·V + G·N + G·P, D), the same numbers in another order.
    """
    heads = k.unflatten(0, (groups, -1))
    rotary, free = heads.split([heads.shape[1] - nope, nope], dim=1)
    return torch.cat([v, free.flatten(0, 1), rotary.flatten(0, 1)])


def key_bias(bias: torch.Tensor, *, groups: int, nope: int, value: int) -> torch.Tensor:
    """Bias of `kv_a_proj_with_mqa` (C + G·P,) from that of the keys; the values' part is zero (see `output_bias`)."""
    return latent_and_keys(bias.new_zeros(groups * value), bias, groups=groups, nope=nope)


def select_groups(*, heads: int, groups: int, nope: int, value: int, scale: float) -> torch.Tensor:
    """`kv_b_proj` (H·(N + V), C): every head picks its group's blocks from the latent.

    `scale` multiplies the values, and so the output of the attention (Granite's residual multiplier).
    """
    weight = torch.zeros(heads, nope + value, groups * (value + nope))
    for head in range(heads):
        group = head * groups // heads
        free = groups * value + group * nope
        weight[head, :nope, free : free + nope] = torch.eye(nope)
        weight[head, nope:, group * value : (group + 1) * value] = torch.eye(value) * scale
    return weight.flatten(0, 1)


def output_bias(*tensors: torch.Tensor, heads: int, groups: int, scale: float) -> torch.Tensor:
    """Bias of `o_proj`: scale · (b_o + W_o [b_v of each head's group]), summed in float64.

    Args:
        tensors: (b_o,), (W_o, b_v) or (b_o, W_o, b_v); W_o is (D, H·V), b_v is (G·V,).
    """
    total = torch.zeros((), dtype=torch.float64)
    if len(tensors) != 2:
        total = total + tensors[0].double()
    if len(tensors) > 1:
        weight, bias = tensors[-2:]
        per_head = bias.double().unflatten(0, (groups, -1)).repeat_interleave(heads // groups, dim=0)
        total = total + weight.double() @ per_head.flatten()
    return total * scale


def position_free_first(query: torch.Tensor, *, heads: int, nope: int) -> torch.Tensor:
    """Rows of each query head (P + N, D) as (N + P, D): the target keeps the rotated part last."""
    per_head = query.unflatten(0, (heads, -1))
    rotary, free = per_head.split([per_head.shape[1] - nope, nope], dim=1)
    return torch.cat([free, rotary], dim=1).flatten(0, 1)


RULES: dict[str, Callable[..., torch.Tensor]] = {
    rule.__name__: rule for rule in (latent_and_keys, key_bias, select_groups, output_bias, position_free_first)
}
