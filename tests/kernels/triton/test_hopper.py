"""The kernels written for Hopper, on tiles that end anywhere."""

import pytest
import torch
from cases import DEVICE, assert_as_good, normal, poison

from hf_moe.kernels import grouped_hopper, reference, weight_gradient_hopper
from hf_moe.kernels.gating import Gating
from hf_moe.kernels.grouped_linear import grouped_linear
from hf_moe.kernels.routing import route
from hf_moe.kernels.tuning import HOPPER
from hf_moe.kernels.up_projection import up_projection
from hf_moe.kernels.weight_gradient import weight_gradient

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)

TILE = HOPPER["down"][96]
# Rows of each expert, then D, F and K. Tiles are 128 × 256, of 64 rows for each warpgroup.
CASES = {
    "ends everywhere": ([0, 1, 65, 130, 300, 64, 128, 0, 127, 193], 512, 448, 2),
    "many tiles a program": ([3000, 0, 1000, 96], 2048, 768, 8),
    "one row": ([1], 384, 384, 1),
    "one expert has nearly all": ([40000, 1, 7, 24], 384, 1408, 4),
    "no rows": ([0, 0, 24], 384, 384, 24),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Every one is seconds of compilation, so what a layer asks for is tried, and not all that there could be.
LINEARS = {
    "down": (False, False),
    "gate gradient": (True, True),
    "gate gradient, copied rows": (True, False),
}
UPS = {
    "gathered, h": (True, True, Gating()),
    "gathered": (True, False, Gating()),
    "copied rows, clipped": (False, True, Gating("gelu_tanh", limit=0.7)),
}


def setup(case):
    """Routing with these many rows an expert, and each row's token."""
    counts, D, _, K = case
    E, N = len(counts), sum(counts)
    expert = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    index_TK = expert[torch.randperm(N, generator=torch.Generator().manual_seed(0))].view(N // K, K).to(DEVICE)
    routing = route(index_TK, E, TILE.m)
    x_TD = normal(N // K, D, dtype=torch.bfloat16)
    return routing, x_TD, reference.spread(x_TD, routing.row_N.long(), K)


@cases
@pytest.mark.parametrize(("swapped", "gathered"), LINEARS.values(), ids=LINEARS)
def test_grouped_linear(case, swapped, gathered):
    counts, D, F, K = case
    routing, x_TD, rows = setup(case)
    weight = normal(len(counts), F, D, dtype=torch.bfloat16)
    if swapped:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert grouped_hopper.suits(x_TD, weight, TILE)
    truth = reference.grouped_linear(rows.double(), weight.double(), routing.offset_E1)
    plain = reference.grouped_linear(rows, weight, routing.offset_E1)
    x, per_token = (x_TD, K) if gathered else (rows, None)
    poison()
    found = grouped_linear(x, weight, routing, TILE, per_token=per_token)
    assert_as_good(found, plain, truth)
    assert torch.equal(found, grouped_linear(x, weight, routing, TILE, per_token=per_token))


@cases
@pytest.mark.parametrize(("gathered", "store_h", "gating"), UPS.values(), ids=UPS)
def test_up_projection(case, gathered, store_h, gating):
    counts, D, F, K = case
    routing, x_TD, rows = setup(case)
    weight = normal(len(counts), 2 * F, D, dtype=torch.bfloat16, scale=D**-0.5)
    assert grouped_hopper.suits(x_TD, weight, TILE, gating=gating)
    truth = reference.up_projection(rows.double(), weight.double(), routing.offset_E1, gating)
    plain = reference.up_projection(rows, weight, routing.offset_E1, gating)
    x, per_token = (x_TD, K) if gathered else (rows, None)
    poison()
    h, a = up_projection(x, weight, routing, gating, TILE, per_token=per_token, store_h=store_h)
    assert (h is not None) == store_h
    if h is not None:
        assert_as_good(h, plain[0], truth[0])
    assert_as_good(a, plain[1], truth[1])


@cases
def test_weight_gradient(case):
    counts, _, F, K = case
    routing, x_TD, rows = setup(case)
    left = normal(sum(counts), F, dtype=torch.bfloat16)
    assert weight_gradient_hopper.suits(left, x_TD, TILE)
    truth = reference.weight_gradient(left.double(), rows.double(), routing.offset_E1)
    plain = reference.weight_gradient(left, rows, routing.offset_E1)
    poison()
    for found in (
        weight_gradient(left, rows, routing, TILE),
        weight_gradient(left, x_TD, routing, TILE, right_per_token=K),
        weight_gradient(x_TD, left, routing, TILE, left_per_token=K).transpose(1, 2),
    ):
        for e in range(len(counts)):
            assert_as_good(found[e], plain[e], truth[e])


@pytest.mark.parametrize("what", ["a bias", "ragged steps", "interleaved", "fp16"])
def test_the_rest_is_left_to_the_portable_kernels(what):
    x, weight = normal(8, 392 if what == "ragged steps" else 384, dtype=torch.bfloat16), normal(2, 64, 384)
    weight = weight.bfloat16() if what != "ragged steps" else normal(2, 64, 392, dtype=torch.bfloat16)
    if what == "fp16":
        x, weight = x.half(), weight.half()
    gating = Gating(interleaved=True) if what == "interleaved" else None
    assert not grouped_hopper.suits(x, weight, TILE, gating=gating, bias=weight if what == "a bias" else None)
