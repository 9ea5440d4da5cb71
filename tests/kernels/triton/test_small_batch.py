"""Layers of few tokens without gradients: unsorted, against float64, on both of their paths."""

import pytest
import torch
from cases import DEVICE, DTYPES, HALF, NAMED, Shape, assert_as_good, index, normal, poison, shapes
from hypothesis import given, settings
from test_layer import GPT_OSS, inputs

from hf_moe.kernels import reference, small_batch, tuning
from hf_moe.kernels.gating import Gating
from hf_moe.kernels.layer import experts
from hf_moe.kernels.single_rows import single_rows
from hf_moe.kernels.tuning import Tile

FEW = {name: shape for name, shape in NAMED.items() if shape.T <= 64} | {
    "two tokens": Shape(2, 40, 24, 5, 3, "sentinels"),
    "more experts than routes": Shape(3, 32, 16, 9, 2),
    "more tokens of an expert than a tile": Shape(50, 32, 16, 2, 2),
    "K=E at one token": Shape(1, 32, 16, 9, 9),
}
ALONE = ("T=1", "two tokens", "no 16-byte rows", "sentinels", "K=E at one token")
few = pytest.mark.parametrize("shape", FEW.values(), ids=FEW)
each_path = pytest.mark.parametrize("single", [0, 64], ids=["expert by expert", "row by row"])


@pytest.fixture(autouse=True)
def unsorted(monkeypatch):
    def never(*_):
        raise AssertionError("a small batch was sorted")

    monkeypatch.setattr("hf_moe.kernels.layer.route", never)
    monkeypatch.setattr(tuning, "is_small_batch", lambda *_: True)


def check(shape: Shape, dtype, gating=Gating(), index_TK=None, **options):  # noqa: B008
    tensors, index_TK = inputs(shape, dtype, gating, **options), index(shape) if index_TK is None else index_TK
    args = [tensors.get(name) for name in ("weight", "up", "down", "up_bias", "down_bias")]
    wide = [None if t is None else t.double() for t in args]
    truth = reference.experts(tensors["x"].double(), index_TK, *wide, gating=gating)
    plain = reference.experts(tensors["x"], index_TK, *args, gating=gating)
    poison()
    with torch.no_grad():
        found = experts(tensors["x"], index_TK, *args, gating=gating)
    assert_as_good(found, plain, truth)
    return found


@few
def test_named_cases_expert_by_expert(shape, monkeypatch):
    monkeypatch.setattr(tuning, "SINGLE_ROWS", 0)
    check(shape, HALF)


@pytest.mark.parametrize("shape", [FEW[name] for name in ALONE], ids=ALONE)
def test_named_cases_row_by_row(shape, monkeypatch):
    monkeypatch.setattr(tuning, "SINGLE_ROWS", 64)
    check(shape, HALF)


@each_path
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes(dtype, single, monkeypatch):
    monkeypatch.setattr(tuning, "SINGLE_ROWS", single)
    check(FEW["two tokens"], dtype)


@few
def test_named_cases_with_bias_and_swapped_weights(shape):
    check(shape, torch.float32, GPT_OSS, biased=True, swapped=True)


@each_path
@pytest.mark.parametrize(
    "gating", [GPT_OSS, Gating("gelu"), Gating("gelu_tanh"), Gating("relu2", gated=False), Gating(limit=0.5)]
)
def test_gates(gating, single, monkeypatch):
    monkeypatch.setattr(tuning, "SINGLE_ROWS", single)
    check(NAMED["no 16-byte rows"], HALF, gating, biased=True)


@settings(max_examples=6, deadline=None)
@given(shapes)
def test_drawn_shapes(shape):
    check(shape, torch.float32)


@each_path
def test_an_expert_named_twice_counts_twice(single, monkeypatch):
    monkeypatch.setattr(tuning, "SINGLE_ROWS", single)
    index_TK = torch.tensor([[1, 1], [0, 2], [2, 2]], device=DEVICE, dtype=torch.int32)
    check(Shape(3, 32, 16, 3, 2), torch.float32, index_TK=index_TK, biased=True)


@each_path
def test_routes_of_no_expert_add_exactly_zero(single, monkeypatch):
    monkeypatch.setattr(tuning, "SINGLE_ROWS", single)
    tensors = inputs(Shape(3, 32, 16, 4, 2), torch.float32, biased=True)
    index_TK = torch.tensor([[4, -1], [-1, 4], [4, 2]], device=DEVICE)
    tensors["weight"][index_TK != 2] = torch.inf
    out = experts(tensors["x"], index_TK, *list(tensors.values())[1:])
    assert not out[:2].any()
    assert out[2].isfinite().all()
    assert out[2].any()


def test_the_same_call_twice_gives_the_same_bits():
    shape = FEW["more tokens of an expert than a tile"]
    tensors, index_TK = inputs(shape, HALF), index(shape)
    first, second = (experts(tensors["x"], index_TK, *list(tensors.values())[1:]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("stages", [1, 2])
def test_products_against_their_twins(stages):
    shape = FEW["two tokens"]
    gating, index_TK, N = Gating(), index(shape), shape.T * shape.K
    x, up = normal(shape.T, shape.D), normal(shape.E, 2 * shape.F, shape.D, scale=0.3)
    bias, weight_TK = normal(shape.E, 2 * shape.F), normal(shape.T, shape.K)
    owned = index_TK.reshape(-1) < shape.E
    gap = shape.F * shape.D
    args = (x.repeat_interleave(shape.K, 0), up, index_TK.reshape(-1), gating, bias)
    plain = reference.routed_rows(*args)
    truth = reference.routed_rows(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args))
    options = {"columns": shape.F, "gap": gap, "gating": gating, "bias_EH": bias}
    poison()
    alone = single_rows(x, up, index_TK, Tile(1, 32, 32, 4, stages), per_token=shape.K, **options)
    together = small_batch.expert_rows(x, up, index_TK, Tile(16, 16, 16, 4, 2), per_token=True, **options)
    for found in (alone, together):
        assert_as_good(found[owned], plain[owned], truth[owned])
    y = normal(N, shape.D)
    y[~owned] = float("nan")
    position = torch.where(owned, torch.arange(N, device=DEVICE), -1)
    assert_as_good(
        small_batch.weigh(y, weight_TK, index_TK, shape.E),
        reference.combine(y, weight_TK, position, shape.K),
        reference.combine(y.double(), weight_TK.double(), position, shape.K),
    )


@pytest.mark.parametrize("T", [1, 3])
def test_dense_products(T):
    x, gate, up, down = normal(T, 40), normal(24, 40, seed=1), normal(24, 40, seed=2), normal(40, 24)
    for found, twin, args in (
        (small_batch.linear, reference.linear, (x, gate)),
        (small_batch.gated_mlp, reference.gated_mlp, (x, gate, up, down)),
        (small_batch.gated_mlp, reference.gated_mlp, (x, gate, up, down, normal(T, 40, seed=3))),
    ):
        poison()
        assert_as_good(found(*args), twin(*args), twin(*(a.double() for a in args)))


def test_operators_agree_with_their_fakes():
    x, gate, up, down = normal(3, 32), normal(16, 32, seed=1), normal(16, 32, seed=2), normal(32, 16)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.hf_moe.few_rows_linear.default, (x, gate), test_utils=tests)
    torch.library.opcheck(torch.ops.hf_moe.gated_mlp.default, (x, gate, up, down, x, "swish"), test_utils=tests)
    shape = NAMED["T=1"]
    tensors = inputs(shape, torch.float32)
    args = (tensors["x"], index(shape), tensors["weight"], tensors["up"], tensors["down"], None, None, *Gating())
    torch.library.opcheck(torch.ops.hf_moe.experts_inference.default, args, test_utils=tests)
