"""Each kernel against its twin in reference.py."""

import pytest
import torch
from cases import NAMED, Shape, assert_as_good, index, normal, poison, shapes
from hypothesis import given, settings

from hf_moe.kernels import reference, routing
from hf_moe.kernels.adapted_gating import adapted_gating_gradient
from hf_moe.kernels.combine import combine, spread
from hf_moe.kernels.gating import Gating, gating_gradient
from hf_moe.kernels.grouped_linear import grouped_linear
from hf_moe.kernels.routing import route
from hf_moe.kernels.spread_low_rank import low_rank_of_tokens, spread_low_rank
from hf_moe.kernels.tuning import Tile
from hf_moe.kernels.up_projection import up_projection
from hf_moe.kernels.weight_gradient import bias_gradient, weight_gradient

PLAIN = Tile(16, 32, 16, 4, 2, group=2)
TILES = {
    "plain": PLAIN,
    "pipelined": PLAIN._replace(per_sm=1, flatten=True),
    "bulk stores": PLAIN._replace(tma_store=True),
    "all": PLAIN._replace(per_sm=1, flatten=True, tma_store=True),
}
SOME = {
    name: NAMED[name] for name in ("plain", "an empty expert", "no 16-byte rows", "more than one block", "sentinels")
}
GATINGS = {
    "silu": Gating(),
    "gelu": Gating("gelu"),
    "gelu tanh": Gating("gelu_tanh"),
    "relu": Gating("relu"),
    "relu2, no gate": Gating("relu2", gated=False),
    "silu, no gate": Gating(gated=False),
    "gpt-oss": Gating(alpha=1.702, limit=0.9, up_offset=1.0, interleaved=True),
    "clipped": Gating(limit=0.7),
}
tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
some = pytest.mark.parametrize("shape", SOME.values(), ids=SOME)
gatings = pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)


def check_route(shape: Shape, tile_rows: int) -> None:
    index_TK = index(shape)
    found = route(index_TK, shape.E, tile_rows)
    row, position, offset = reference.route(index_TK, shape.E)
    assert torch.equal(found.row_N.long(), row)
    assert torch.equal(found.position_N.long(), position)
    assert torch.equal(found.offset_E1.long(), offset)
    walked = [
        (e, first, int(offset[e + 1]))
        for e in range(shape.E)
        for first in range(int(offset[e]), int(offset[e + 1]), tile_rows)
    ]
    used = int(found.tile[-1])
    assert used == len(walked) <= found.max_tiles <= found.capacity
    assert found.tile[:-1].view(3, -1)[:, :used].T.tolist() == [list(tile) for tile in walked]


@pytest.mark.parametrize("shape", [s for s in NAMED.values() if s.T], ids=[n for n, s in NAMED.items() if s.T])
def test_route(shape):
    check_route(shape, 16)


@some
def test_route_in_three_launches(shape, monkeypatch):
    monkeypatch.setattr(routing, "ONE_LAUNCH", 0)
    check_route(shape, 16)


@settings(max_examples=15, deadline=None)
@given(shapes.filter(lambda shape: shape.T > 0))
def test_route_of_drawn_shapes(shape):
    check_route(shape, 32)


@some
@tiles
@pytest.mark.parametrize("swapped", [False, True])
def test_grouped_linear(shape, tile, swapped):
    index_TK = index(shape)
    routing = route(index_TK, shape.E, tile.m)
    owned = int(routing.offset_E1[-1])
    x_TD, weight = normal(shape.T, shape.D), normal(shape.E, shape.F, shape.D)
    bias = normal(shape.E, shape.F)
    if swapped:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    rows = reference.spread(x_TD, routing.row_N.long(), shape.K)
    truth = reference.grouped_linear(rows.double(), weight.double(), routing.offset_E1, bias.double())
    plain = reference.grouped_linear(rows, weight, routing.offset_E1, bias)
    poison()
    gathered = grouped_linear(x_TD, weight, routing, tile, bias_EO=bias, per_token=shape.K)
    copied = grouped_linear(rows, weight, routing, tile, bias_EO=bias, zero_unowned=True)
    assert_as_good(gathered[:owned], plain[:owned], truth[:owned])
    assert_as_good(copied, plain, truth)


@gatings
@tiles
@pytest.mark.parametrize("swapped", [False, True])
def test_up_projection(gating, tile, swapped):
    shape = NAMED["N off the block size"]
    routing = route(index(shape), shape.E, tile.m)
    x_TD, weight = normal(shape.T, shape.D), normal(shape.E, gating.fan * shape.F, shape.D, scale=0.3)
    bias = normal(shape.E, gating.fan * shape.F)
    if swapped:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    rows = reference.spread(x_TD, routing.row_N.long(), shape.K)
    args = (rows, weight, routing.offset_E1, gating, bias)
    plain = reference.up_projection(*args)
    truth = reference.up_projection(rows.double(), weight.double(), routing.offset_E1, gating, bias.double())
    for source, per_token in ((x_TD, shape.K), (rows, None)):
        poison()
        found = up_projection(
            source, weight, routing, gating, tile, per_token=per_token, bias_EH=bias, store_h=True, store_a=True
        )
        for f, p, t in zip(found, plain, truth, strict=True):
            assert_as_good(f, p, t)
    assert up_projection(rows, weight, routing, gating, tile, store_h=False)[0] is None


@gatings
@pytest.mark.parametrize("biased", [False, True])
def test_gating_gradient(gating, biased):
    shape = NAMED["sentinels"]
    index_TK = index(shape)
    routing = route(index_TK, shape.E, 16)
    owned, row = int(routing.offset_E1[-1]), routing.row_N.long()
    h, da = normal(shape.T * shape.K, gating.fan * shape.F), normal(shape.T * shape.K, shape.F, seed=1)
    weight_TK, dout = normal(shape.T, shape.K), normal(shape.T, shape.D)
    bias = normal(shape.E, shape.D) if biased else None
    expert = index_TK.reshape(-1)[row].clamp(max=shape.E - 1)
    y_bias = None if bias is None else (dout[row // shape.K] * bias[expert]).sum(-1)
    args = (h, da, weight_TK.reshape(-1)[row], gating, y_bias)
    plain = reference.gating_gradient(*args)
    truth = reference.gating_gradient(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    poison()
    dh, wa, dweight = gating_gradient(
        h, da.clone(), weight_TK, routing, gating, index_TK=index_TK, dout_TD=dout, bias_ED=bias
    )
    assert_as_good(dh[:owned], plain[0][:owned], truth[0][:owned], "dh")
    assert_as_good(wa[:owned], plain[1][:owned], truth[1][:owned], "wa")
    dweight_N = dweight.reshape(-1)
    assert_as_good(dweight_N[row[:owned]], plain[2][:owned], truth[2][:owned], "dweight")
    assert not dweight_N[row[owned:]].any()


@gatings
@pytest.mark.parametrize("columns", [16, 32])
def test_adapted_gating_gradient(gating, columns):
    shape = NAMED["sentinels"]
    N, H, rank = shape.T * shape.K, gating.fan * shape.F, 5
    index_TK = index(shape)
    routing = route(index_TK, shape.E, 16)
    owned, row = int(routing.offset_E1[-1]), routing.row_N.long()
    weight_TK, dout, bias = normal(shape.T, shape.K), normal(shape.T, shape.D), normal(shape.E, shape.D)
    y_bias = (dout[row // shape.K] * bias[index_TK.reshape(-1)[row].clamp(max=shape.E - 1)]).sum(-1)
    up = normal(N, rank), normal(shape.E, rank, H).transpose(1, 2)
    down = normal(N, rank, seed=1), normal(shape.E, rank, shape.F)
    h, da, weight_N = normal(N, H), normal(N, shape.F), weight_TK.reshape(-1)[row]
    plain = reference.adapted_gating_gradient(h, da, weight_N, routing.offset_E1, gating, up, down, y_bias)
    wide_up, wide_down = (tuple(t.double() for t in pair) for pair in (up, down))
    truth = reference.adapted_gating_gradient(
        h.double(), da.double(), weight_N.double(), routing.offset_E1, gating, wide_up, wide_down, y_bias.double()
    )
    poison()
    found = adapted_gating_gradient(
        h,
        da.clone(),
        weight_TK,
        routing,
        gating,
        Tile(16, columns, 0, 4, 2),
        up=up,
        down=down,
        dout_TD=dout,
        bias_ED=bias,
    )
    for name, f, p, t in zip(found._fields, found, plain, truth, strict=True):
        if name == "dweight_TK":
            f = f.reshape(-1)[row]
            assert not f[owned:].any()
        if len(f) == N:
            f, p, t = f[:owned], p[:owned], t[:owned]
        assert_as_good(f, p, t, name)


@some
def test_spread_low_rank(shape):
    routing = route(index(shape), shape.E, 16)
    owned, row = int(routing.offset_E1[-1]), routing.row_N.long()
    x, a = normal(shape.T, shape.D), normal(shape.E, shape.D, 3).transpose(1, 2)
    y, z = reference.spread_low_rank(x, a, row, routing.offset_E1, shape.K)
    truth = reference.spread_low_rank(x.double(), a.double(), row, routing.offset_E1, shape.K)[1]
    poison()
    found_y, found_z = spread_low_rank(x, a, routing, shape.K, Tile(16, 16, 32, 4, 2))
    assert torch.equal(found_y[:owned], y[:owned])
    assert_as_good(found_z[:owned], z[:owned], truth[:owned])
    alone = low_rank_of_tokens(x, a, routing, shape.K, Tile(16, 16, 32, 4, 2))
    assert torch.equal(alone[:owned], found_z[:owned])


@some
def test_combine_and_spread(shape):
    routing = route(index(shape), shape.E, 16)
    y, weight, x = normal(shape.T * shape.K, shape.D), normal(shape.T, shape.K), normal(shape.T, shape.D)
    y[int(routing.offset_E1[-1]) :] = float("nan")
    for w in (weight, None):
        wide = None if w is None else w.double()
        truth = reference.combine(y.double(), wide, routing.position_N, shape.K)
        assert_as_good(combine(y, w, routing, shape.K), reference.combine(y, w, routing.position_N, shape.K), truth)
    owned = int(routing.offset_E1[-1])
    assert torch.equal(spread(x, routing, shape.K)[:owned], reference.spread(x, routing.row_N.long(), shape.K)[:owned])


@some
@pytest.mark.parametrize("tile", [*TILES.values(), PLAIN._replace(group=0)], ids=[*TILES, "experts first"])
def test_weight_gradient(shape, tile):
    routing = route(index(shape), shape.E, 16)
    left, x_TD = normal(shape.T * shape.K, shape.F), normal(shape.T, shape.D)
    rows = reference.spread(x_TD, routing.row_N.long(), shape.K)
    truth = reference.weight_gradient(left.double(), rows.double(), routing.offset_E1)
    plain = reference.weight_gradient(left, rows, routing.offset_E1)
    left[int(routing.offset_E1[-1]) :] = float("nan")
    for found in (
        weight_gradient(left, rows, routing, tile),
        weight_gradient(left, x_TD, routing, tile, right_per_token=shape.K),
        weight_gradient(x_TD, left, routing, tile, left_per_token=shape.K).transpose(1, 2),
    ):
        for e in range(shape.E):
            assert_as_good(found[e], plain[e], truth[e])


@some
def test_bias_gradient(shape):
    index_TK = index(shape)
    routing = route(index_TK, shape.E, 16)
    y, dout, weight = normal(shape.T * shape.K, shape.F), normal(shape.T, shape.D), normal(shape.T, shape.K)
    row = routing.row_N.long()
    weight_N = weight.reshape(-1)[row]
    for found, args in (
        (bias_gradient(y, routing), (y, None)),
        (bias_gradient(dout, routing, per_token=shape.K, weight_TK=weight), (dout[row // shape.K], weight_N)),
    ):
        wide = [None if a is None else a.double() for a in args]
        truth = reference.bias_gradient(wide[0], routing.offset_E1, wide[1])
        assert_as_good(found, reference.bias_gradient(args[0], routing.offset_E1, args[1]), truth)
