"""The expert layer with adapters: numbers and every gradient against float64, zeros, and one graph."""

import pytest
import torch
from cases import DTYPES, HALF, NAMED, Shape, assert_as_good, index, normal, poison

from hf_moe.kernels import reference
from hf_moe.kernels.gating import Gating
from hf_moe.kernels.lora import experts_lora

ADAPTERS = ("up_a", "up_b", "down_a", "down_b")
GPT_OSS = Gating(alpha=1.702, limit=0.9, up_offset=1.0, interleaved=True)


def inputs(shape: Shape, dtype, rank=4, gating=Gating(), biased=False, swapped=False, apart=False):  # noqa: B008
    D, F, E, H = shape.D, shape.F, shape.E, gating.fan * shape.F
    leaves = {
        "x": normal(shape.T, D, dtype=dtype),
        "weight": normal(shape.T, shape.K).abs(),
        "up_a": normal(E, rank, D, dtype=dtype, scale=D**-0.5),
        "up_b": normal(E, rank, H, dtype=dtype, scale=rank**-0.5).transpose(1, 2),
        "down_a": normal(E, rank, F, dtype=dtype, scale=F**-0.5, seed=1),
        "down_b": normal(E, D, rank, dtype=dtype, scale=rank**-0.5, seed=1),
    }
    if apart:
        leaves["x"] = normal(shape.T, 2 * D, dtype=dtype)[:, :D]
    frozen = [normal(E, H, D, dtype=dtype, scale=D**-0.5), normal(E, D, F, dtype=dtype, scale=F**-0.5, seed=2)]
    if swapped:
        frozen = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in frozen]
    return leaves, frozen + ([normal(E, H, dtype=dtype), normal(E, D, dtype=dtype)] if biased else [])


def run(function, leaves, frozen, index_TK, gating, dtype=None, projections=("up", "down")):
    kept = {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for name, tensor in leaves.items()
        if name.split("_")[0] in ("x", "weight", *projections)
    }
    adapters = {f"{side}_lora": (kept[f"{side}_a"], kept[f"{side}_b"]) for side in projections}
    rest = [tensor.to(dtype or tensor.dtype) for tensor in frozen]
    out = function(kept["x"], index_TK, kept["weight"], *rest, gating=gating, **adapters)
    dout = normal(*out.shape, seed=7).to(leaves["x"].dtype).to(out.dtype)
    return {"out": out.detach()} | dict(zip(kept, torch.autograd.grad(out, list(kept.values()), dout), strict=True))


def check(shape, dtype, *, rank=4, gating=Gating(), projections=("up", "down"), **options):  # noqa: B008
    leaves, frozen = inputs(shape, dtype, rank, gating, **options)
    arguments = (leaves, frozen, index(shape), gating)
    truth = run(reference.experts_lora, *arguments, torch.float64, projections)
    plain = run(reference.experts_lora, *arguments, projections=projections)
    poison()
    found = run(experts_lora, *arguments, projections=projections)
    for name in truth:
        assert_as_good(found[name], plain[name], truth[name], name)
    return found


@pytest.mark.parametrize("shape", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_named_cases(shape, dtype):
    check(shape, dtype)


# Above 32 the backward takes passes of their own for the narrow products, above 128 z has more columns than a tile.
@pytest.mark.parametrize("rank", [1, 16, 20, 40, 136])
def test_ranks_with_bias_and_swapped_weights(rank):
    check(NAMED["sentinels"], torch.float32, rank=rank, gating=GPT_OSS, biased=True, swapped=True)


def test_tokens_that_lie_apart_in_memory():
    check(NAMED["plain"], torch.float32, apart=True)


@pytest.mark.parametrize("projections", [("up",), ("down",)])
def test_one_projection(projections):
    check(NAMED["N off the block size"], HALF, projections=projections, gating=Gating("relu2", gated=False))


def test_an_expert_without_rows_gets_exactly_zero():
    found = check(NAMED["an empty expert"], torch.float32)
    for name in ADAPTERS:
        assert not found[name][0].any()
        assert found[name][1].any()


def test_torch_compile_without_graph_breaks():
    leaves, frozen = inputs(NAMED["plain"], torch.float32)
    compiled = torch.compile(experts_lora, fullgraph=True, backend="aot_eager")
    found, wanted = (run(f, leaves, frozen, index(NAMED["plain"]), Gating()) for f in (compiled, experts_lora))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


# "T=1" has an expert for most rows and none for the others.
@pytest.mark.parametrize("name", ["plain", "T=0", "T=1"])
def test_operators_keep_their_contract(name):
    leaves, frozen = inputs(NAMED[name], torch.float32)
    for tensor in leaves.values():
        tensor.requires_grad_()
    args = (
        leaves["x"],
        index(NAMED[name]),
        leaves["weight"],
        *frozen,
        None,
        None,
        *(leaves[n] for n in ADAPTERS),
        *Gating(),
    )
    torch.library.opcheck(
        torch.ops.hf_moe.experts_lora.default,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
