"""The whole layer: numbers and every gradient against float64, and the promises about memory, zeros and graphs."""

import pytest
import torch
from cases import DEVICE, DTYPES, HALF, NAMED, Shape, assert_as_good, index, normal, poison, shapes
from hypothesis import given, settings

from hf_moe.kernels import reference
from hf_moe.kernels.any_gate import experts_with_gate
from hf_moe.kernels.gating import Gating
from hf_moe.kernels.layer import experts

NAMES = ("x", "weight", "up", "down", "up_bias", "down_bias")
GPT_OSS = Gating(alpha=1.702, limit=0.9, up_offset=1.0, interleaved=True)


def inputs(
    shape: Shape,
    dtype,
    gating=Gating(),  # noqa: B008
    biased=False,
    swapped=False,
    weight_dtype=torch.float32,
    apart=False,
):
    H = gating.fan * shape.F
    found = {
        "x": normal(shape.T, shape.D, dtype=dtype),
        "weight": normal(shape.T, shape.K, dtype=weight_dtype).abs(),
        "up": normal(shape.E, H, shape.D, dtype=dtype, scale=shape.D**-0.5),
        "down": normal(shape.E, shape.D, shape.F, dtype=dtype, scale=shape.F**-0.5),
    }
    if swapped:
        found |= {name: found[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("up", "down")}
    if apart:
        found["x"] = normal(shape.T, 2 * shape.D, dtype=dtype)[:, : shape.D]
    if biased:
        found |= {"up_bias": normal(shape.E, H, dtype=dtype), "down_bias": normal(shape.E, shape.D, dtype=dtype)}
    return found


def run(function, tensors, index_TK, dout, dtype=None, **options):
    """Output and gradients, by name."""
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
    rest = [leaves[name] for name in NAMES[1:] if name in leaves]
    out = function(leaves["x"], index_TK, *rest, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def check(shape: Shape, dtype, gating=Gating(), *, recompute=False, **options):  # noqa: B008
    tensors, index_TK = inputs(shape, dtype, gating, **options), index(shape)
    dout = normal(shape.T, shape.D, dtype=dtype, seed=7)
    truth = run(reference.experts, tensors, index_TK, dout, torch.float64, gating=gating)
    plain = run(reference.experts, tensors, index_TK, dout, gating=gating)
    poison()
    found = run(experts, tensors, index_TK, dout, gating=gating, recompute=recompute)
    for name in truth:
        assert_as_good(found[name], plain[name], truth[name], name)
    return found


@pytest.mark.parametrize("shape", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_named_cases(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("shape", NAMED.values(), ids=NAMED)
def test_named_cases_with_bias_and_swapped_weights(shape):
    check(shape, torch.float32, GPT_OSS, biased=True, swapped=True)


@pytest.mark.parametrize(
    "gating", [Gating("gelu"), Gating("gelu_tanh"), Gating("relu2", gated=False), Gating(limit=0.5)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_gates(gating, recompute):
    check(NAMED["N off the block size"], HALF, gating, recompute=recompute, biased=True)


@settings(max_examples=6, deadline=None)
@given(shapes)
def test_drawn_shapes(shape):
    check(shape, torch.float32)


# Experts as wide as that read copied rows in training.
@pytest.mark.parametrize("width", [16, 512])
def test_tokens_that_lie_apart_in_memory(width):
    check(Shape(7, 32, width, 4, 2), torch.float32, apart=True)


def test_routing_weights_in_the_dtype_of_x():
    check(NAMED["plain"], HALF, weight_dtype=HALF)


def test_an_empty_expert_and_sentinels_get_exact_zeros():
    found = check(NAMED["an empty expert"], torch.float32, biased=True)
    assert all(not found[name][0].any() for name in ("up", "down", "up_bias", "down_bias"))
    shape = NAMED["sentinels"]
    found = check(shape, torch.float32, biased=True)
    assert not found["weight"][index(shape) == shape.E].any()
    nowhere = torch.full((3, 2), shape.E, device=DEVICE)
    tensors = {name: t.requires_grad_() for name, t in inputs(Shape(3, 32, 16, 4, 2), torch.float32).items()}
    out = experts(tensors["x"], nowhere, *list(tensors.values())[1:])
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), list(tensors.values())))


@pytest.mark.parametrize("frozen", [("up", "down"), ("x",), ("weight",), ("x", "weight", "up"), ("down",)])
def test_frozen_tensors_get_no_gradient(frozen):
    shape, index_TK = NAMED["plain"], index(NAMED["plain"])
    tensors = inputs(shape, torch.float32)
    everything = run(experts, tensors, index_TK, torch.ones(shape.T, shape.D, device=DEVICE))
    leaves = {name: t.requires_grad_(name not in frozen) for name, t in tensors.items()}
    experts(leaves["x"], index_TK, *list(leaves.values())[1:]).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, everything[name])


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_backward(recompute):
    shape = NAMED["plain"]
    tensors = {name: t.requires_grad_() for name, t in inputs(shape, torch.float32).items()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(tensors["x"], index(shape), *list(tensors.values())[1:], recompute=recompute)
    given = {t.data_ptr() for t in tensors.values()}
    new = [t for t in kept if t.data_ptr() not in given and t.is_floating_point() and t.numel()]
    N = shape.T * shape.K
    assert [tuple(t.shape) for t in new] == ([] if recompute else [(N, 2 * shape.F)])
    assert sum(t.numel() for t in kept if t.dtype == torch.int32) <= 2 * N + 4 * (shape.E + N // 16 + 1) + 2


def test_the_same_call_twice_gives_the_same_bits():
    shape = NAMED["more than one block"]
    tensors, index_TK = inputs(shape, HALF), index(shape)
    first, second = (run(experts, tensors, index_TK, normal(shape.T, shape.D)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [NAMED["sentinels"], NAMED["T=0"]], ids=["sentinels", "T=0"])
def test_a_gate_of_ones_own(shape):
    tensors, index_TK, dout = inputs(shape, torch.float32), index(shape), normal(shape.T, shape.D, seed=7)
    fused = run(experts, tensors, index_TK, dout)
    own = run(
        lambda x, i, w, up, down: experts_with_gate(
            x,
            i,
            w,
            up,
            down,
            None,
            None,
            gate=lambda h: torch.nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        ),
        tensors,
        index_TK,
        dout,
    )
    for name in fused:
        torch.testing.assert_close(own[name], fused[name], rtol=1e-4, atol=1e-5)


def test_torch_compile_without_graph_breaks():
    shape = NAMED["plain"]
    tensors, index_TK, dout = inputs(shape, torch.float32), index(shape), normal(shape.T, shape.D, seed=7)
    eager = run(experts, tensors, index_TK, dout)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    found = run(compiled, tensors, index_TK, dout)
    for name in eager:
        torch.testing.assert_close(found[name], eager[name])


@pytest.fixture
def filled_memory():
    """What a kernel leaves unwritten is the same in every call."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning")
def test_the_operators_agree_with_their_fakes(filled_memory):
    shape = NAMED["plain"]
    tensors = {name: t.requires_grad_() for name, t in inputs(shape, torch.float32).items()}
    args = (tensors["x"], index(shape), tensors["weight"], tensors["up"], tensors["down"], None, None, *Gating(), False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.hf_moe.experts.default, args, test_utils=tests)
    args = (index(shape), tensors["x"], shape.E)
    torch.library.opcheck(torch.ops.hf_moe.route.default, args, test_utils=tests[:3])
    routing = torch.ops.hf_moe.route(*args)
    linear = (tensors["x"], tensors["up"], None, *routing, shape.K)
    torch.library.opcheck(torch.ops.hf_moe.grouped_linear.default, linear, test_utils=tests)
