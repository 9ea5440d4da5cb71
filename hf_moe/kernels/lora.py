"""The expert layer with low-rank adapters on frozen experts: W + B·A is never formed, and W gets no gradient.

    h = up[e] @ x + up_b[e] @ (up_a[e] @ x)        a = gate(h)        y = down[e] @ a + down_b[e] @ (down_a[e] @ a)

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden, F expert width, H = 2F (gated) or F, E experts,
R rank, I and O input and output columns of a projection.
"""

import torch
from torch import Tensor

from .adapted_gating import AdaptedGatingGradient, adapted_gating_gradient
from .combine import combine, spread
from .descriptors import dense_side
from .gating import GATING_SCHEMA, Gating, gating_gradient
from .grouped_linear import grouped_linear
from .layer import Plan
from .operators import Operator
from .routing import ROUTING_SCHEMA, Routing, route, tile_capacity
from .row_products import Adapter
from .spread_low_rank import low_rank_of_tokens, spread_low_rank
from .tuning import Tile, power_of_2
from .up_projection import up_projection
from .weight_gradient import weight_gradient

# Up to this rank the gate's gradient and what reads its results are one launch; above, its parts cost more than passes.
_ONE_PASS_RANK = 32
# Up to this rank a program holds all of z's columns.
_NARROW = 128


def _narrow(rank: int, tile_rows: int, x: Tensor) -> Tile:
    """A row tile as high as the layer's and as wide as the rank."""
    width = min(max(16, power_of_2(rank)), _NARROW)
    return Tile(tile_rows, width, 64 if x.is_cuda and x.dtype != torch.float32 else 32, 4, 3)


def _passing(x: Tensor, m: int, warps: int) -> Tile:
    """Rows and columns at a time of `spread_low_rank` and `low_rank_of_tokens`."""
    return Tile(m, 16, 128 if x.dtype != torch.float32 else 32, warps, 3) if x.is_cuda else Tile(16, 16, 32, 4, 2)


def _low_rank(x: Tensor, a_ERI: Tensor, routing: Routing, per_token: int | None = None) -> Tensor:
    """z[n] = a[e] @ x[row]."""
    if per_token is not None and a_ERI.shape[1] <= _NARROW:
        return low_rank_of_tokens(x, a_ERI, routing, per_token, _passing(x, 128, 8))
    return grouped_linear(x, a_ERI, routing, _narrow(a_ERI.shape[1], routing.tile_rows, x), per_token=per_token)


def _rows_and_low_rank(x: Tensor, a_ERI: Tensor, routing: Routing, K: int) -> tuple[Tensor, Tensor]:
    """The rows of the tokens, and z of them."""
    if a_ERI.shape[1] <= _NARROW:
        return spread_low_rank(x, a_ERI, routing, K, _passing(x, 64, 4))
    rows = spread(x, routing, K)
    return rows, _low_rank(rows, a_ERI, routing)


def _low_rank_gradient(wide: Tensor, narrow_NR: Tensor, routing: Routing, per_token: int | None = None) -> Tensor:
    """Σ wide[row] ⊗ narrow[n] over each expert's rows, as (E, C, R): the rank is the short side of a tile."""
    tile = _narrow(narrow_NR.shape[1], 128 if wide.is_cuda else 32, wide)
    return weight_gradient(wide, narrow_NR, routing, tile._replace(group=0), left_per_token=per_token)


def _gating_tile(h: Tensor) -> Tile:
    """Rows of a program of `adapted_gating_gradient`, and columns of its narrow products."""
    return Tile(128, 128 if h.dtype != torch.float32 else 32, 0, 8, 2) if h.is_cuda else Tile(16, 16, 0, 4, 2)


def _rank(a_ERI: Tensor | None) -> int:
    return 0 if a_ERI is None else a_ERI.shape[1]


def _gate_and_narrow(h_NH, da_NF, weight_TK, routing, gating, *, up, down, index_TK, dout_TD, bias_ED):
    """`adapted_gating_gradient` in separate passes."""
    dh, wa, dweight = gating_gradient(
        h_NH, da_NF, weight_TK, routing, gating, index_TK=index_TK, dout_TD=dout_TD, bias_ED=bias_ED,
        store_a=down is not None,
    )  # fmt: skip
    up_dz = dup_b = aa = ddown_a = None
    if up is not None:
        z, up_b = up
        up_dz, dup_b = _low_rank(dh, up_b.transpose(1, 2), routing), _low_rank_gradient(dh, z, routing)
    if down is not None:
        dz, down_a = down
        aa = _low_rank(wa, down_a, routing)
        ddown_a = _low_rank_gradient(wa, dz, routing).transpose(1, 2).contiguous()
    return AdaptedGatingGradient(dh, dweight, up_dz, dup_b, aa, ddown_a)


_ADAPTED = (
    "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b"
)
_library = torch.library.Library("hf_moe", "FRAGMENT")
_library.define(f"experts_lora(Tensor x, Tensor index, Tensor weight, {_ADAPTED}, {GATING_SCHEMA})"
                " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
_library.define(f"experts_lora_backward(Tensor dout, Tensor x, Tensor h, Tensor z, Tensor index, Tensor weight, "
                f"{_ADAPTED}, {ROUTING_SCHEMA}, {GATING_SCHEMA}, bool[] needs)"
                " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")  # fmt: skip


def _forward(
    x, index, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b,
    act, alpha, limit, up_offset, gated, interleaved,
):  # fmt: skip
    gating = Gating(act, alpha, limit, up_offset, gated, interleaved)
    x, up, down = x.contiguous(), dense_side(up), dense_side(down)
    (T, K), E = index.shape, up.shape[0]
    if T == 0:
        none = index.new_empty(0, dtype=torch.int32)
        empty = (x.new_empty(0), x.new_empty(0), none, none.clone(), none.clone(), none.clone())
        return x.new_zeros(x.shape), *empty
    plan = Plan.of(x.device, x.dtype, T * K // E)
    routing = route(index, E, plan.up.m)
    z = up_adapter = down_adapter = None
    if up_a is None:
        x_rows = spread(x, routing, K)
    else:
        x_rows, z = _rows_and_low_rank(x, up_a, routing, K)
        up_adapter = Adapter(z, up_b)
    h, a = up_projection(
        x_rows, up, routing, gating, plan.up_rows, bias_EH=up_bias, adapter=up_adapter, store_h=True
    )  # fmt: skip
    assert h is not None
    assert a is not None
    del x_rows
    if down_a is not None:
        down_adapter = Adapter(_low_rank(a, down_a, routing), down_b)
    y = grouped_linear(a, down, routing, plan.down, bias_EO=down_bias, adapter=down_adapter)
    return combine(y, weight, routing, K), h, x.new_empty(0) if z is None else z, *routing[:4]


def _forward_fake(x, index, weight, up, down, up_bias, down_bias, up_a, *_):
    (T, K), E = index.shape, up.shape[0]
    if isinstance(T, int) and T == 0:
        h, z, sizes = x.new_empty(0), x.new_empty(0), (0, 0, 0, 0)
    else:
        h = x.new_empty((T * K, up.shape[1]))
        z = x.new_empty(0) if up_a is None else x.new_empty((T * K, up_a.shape[1]))
        sizes = (T * K, T * K, E + 1, 3 * tile_capacity(T * K, E) + 1)
    return x.new_empty(x.shape), h, z, *(index.new_empty(size, dtype=torch.int32) for size in sizes)


def _backward(
    dout, x, h, z, index, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b, row, position, offset, tile,
    act, alpha, limit, up_offset, gated, interleaved, needs,
):  # fmt: skip
    gating = Gating(act, alpha, limit, up_offset, gated, interleaved)
    needs_x = needs[0]
    x, up, down, dout = x.contiguous(), dense_side(up), dense_side(down), dout.contiguous()
    (T, K), E = index.shape, up.shape[0]
    likes = (x, weight, up_a, up_b, down_a, down_b)
    if T == 0:
        return tuple(
            torch.zeros_like(like, memory_format=torch.contiguous_format) if need else dout.new_empty(0)
            for like, need in zip(likes, needs, strict=True)
        )
    plan = Plan.of(x.device, x.dtype, T * K // E)
    routing = Routing(row, position, offset, tile, plan.up.m)
    none = dout.new_empty(0)
    dx = dup_a = ddown_b = none
    # The gradient of each input is a linear with an adapter of its own: both factors swapped and turned.
    da_adapter = dx_adapter = up_pair = down_pair = None
    if up_a is not None:
        up_pair = z, up_b
    if down_a is not None:
        # From the tokens, as dout itself is read below: a copy of its rows would cost more than it saves.
        dz = _low_rank(dout, down_b.transpose(1, 2), routing, K)
        da_adapter, down_pair = Adapter(dz, down_a.transpose(1, 2)), (dz, down_a)
    da = grouped_linear(dout, down.transpose(1, 2), routing, plan.gate_gradient, adapter=da_adapter, per_token=K)
    pairs = {"up": up_pair, "down": down_pair, "dout_TD": dout, "bias_ED": down_bias}
    if max(_rank(up_a), _rank(down_a)) <= _ONE_PASS_RANK:
        found = adapted_gating_gradient(h, da, weight, routing, gating, _gating_tile(h), **pairs)
    else:
        found = _gate_and_narrow(h, da, weight, routing, gating, index_TK=index, **pairs)
    dh, dweight, up_dz, dup_b, aa, ddown_a = found
    del da
    if aa is not None:
        # aa carries the routing weight, so neither dz nor dout needs it.
        ddown_b = _low_rank_gradient(dout, aa, routing, K)
    if up_dz is not None:
        dup_a = _low_rank_gradient(x, up_dz, routing, K).transpose(1, 2).contiguous()
        dx_adapter = Adapter(up_dz, up_a.transpose(1, 2))
    if needs_x:
        dx_rows = grouped_linear(dh, up.transpose(1, 2), routing, plan.x_gradient, adapter=dx_adapter)
        dx = combine(dx_rows, None, routing, K)
    gradients = (dx, dweight, dup_a, dup_b, ddown_a, ddown_b)
    return tuple(g if need and g is not None else none.clone() for g, need in zip(gradients, needs, strict=True))


def _backward_fake(
    dout, x, h, z, index, weight, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b, row, position, offset, tile,
    act, alpha, limit, up_offset, gated, interleaved, needs,
):  # fmt: skip
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format) if need else dout.new_empty(0)
        for like, need in zip((x, weight, up_a, up_b, down_a, down_b), needs, strict=True)
    )


_DIFFERENTIABLE = (0, 2, 7, 8, 9, 10)


def _setup(ctx, inputs, output):
    ctx.gating = inputs[11:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], *output[1:])


def _autograd(ctx, dout, *_):
    gradients: list[Tensor | None] = [None] * 17
    if dout is None:
        return tuple(gradients)
    # Unpacked once: a checkpointed layer computes them again at the first look, and refuses a second one.
    saved = ctx.saved_tensors
    x, *given = saved[:11]
    h, z, *routing = saved[11:]
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = _experts_lora_backward(dout, x, h, z, *given, *routing, *ctx.gating, needs)
    for i, need, gradient in zip(_DIFFERENTIABLE, needs, found, strict=True):
        gradients[i] = gradient if need else None
    return tuple(gradients)


_experts_lora = Operator("experts_lora", _forward, _library)
_experts_lora_backward = Operator("experts_lora_backward", _backward, _library)
torch.library.register_fake("hf_moe::experts_lora", _forward_fake, lib=_library)
torch.library.register_fake("hf_moe::experts_lora_backward", _backward_fake, lib=_library)
_experts_lora.register_gradient(_autograd, _setup)


def experts_lora(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    *,
    up_lora: tuple[Tensor, Tensor] | None = None,
    down_lora: tuple[Tensor, Tensor] | None = None,
    gating: Gating = Gating(),  # noqa: B008 a NamedTuple is immutable
) -> Tensor:
    """`experts` with frozen weights and biases, and low-rank adapters on either projection.

        out[t] = Σ_k weight[t, k] · (down[e] @ a + down_b[e] @ (down_a[e] @ a) + down_bias[e])
        a = gate(up[e] @ x[t] + up_b[e] @ (up_a[e] @ x[t]) + up_bias[e])      e = index[t, k]

    Args:
        up_lora, down_lora: (a_ERI, b_EOR) in x's dtype, b scaled already; None for a projection without one. Several
            adapters are one of their summed rank. The rest is as for `experts`.
    Returns:
        out_TD in x's dtype; every product is accumulated in fp32.
    Gradients: x, routing weights, a and b; exactly zero for an expert without rows. None for weights and biases.
    Kept for backward: x, h (N·H), up_a @ x (N·R), index, weight, and some 9·N bytes of row numbers.
    Cost: 4·N·D·(H + F) FLOPs forward and backward together, where training the weights costs 6, and 6·R for each row
        and each column of both sides of both projections.
    Source: LoRA, arXiv:2106.09685; a grouped product for each factor, as in arXiv:2403.08245.
    """
    out, *_ = _experts_lora(
        x_TD, index_TK, weight_TK, up_EHD, down_EDF, up_bias_EH, down_bias_ED,
        *(up_lora or (None, None)), *(down_lora or (None, None)), *gating,
    )  # fmt: skip
    return out
