"""Norms and losses with their gradients against float64, and both in whole models of Transformers."""

import pytest
import torch
from cases import DEVICE, DTYPES, HALF, assert_as_good, normal, poison
from test_models import build, step
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe.kernels import reference, rms_norm, stand_ins
from hf_moe.kernels.cross_entropy import cross_entropy
from hf_moe.kernels.experts import accelerate, restore
from hf_moe.model import attention_hf_moe
from hf_moe.model.fused_hf_moe import FUSED

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SIZES = {
    "plain": (3, 64),
    "off the block": (2, 5, 100),
    "one row": (1, 48),
    "no row": (0, 32),
    "rows by the thousand": (1030, 24),
    "wide": (2, 1025),
}


@pytest.fixture
def kernels(monkeypatch):
    """Which kernels ran; they run in the interpreter too."""
    used = []

    def fused(name, *tensors):
        used.append(name)
        return FUSED[name]

    monkeypatch.setattr(stand_ins, "fused", fused)
    return used


def gradients(function, leaves, dtype=None):
    kept = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = function(*kept)
    dout = normal(*out.shape, seed=5).to(leaves[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, kept, dout)]


@DTYPE
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_rms_norm(size, dtype, rounds):
    leaves = normal(*size, dtype=dtype), normal(size[-1], dtype=dtype, seed=1)
    truth = gradients(lambda x, w: reference.rms_norm(x, w, 1e-6, rounds), leaves, torch.float64)
    plain = gradients(lambda x, w: reference.rms_norm(x, w, 1e-6, rounds), leaves)
    poison()
    found = gradients(lambda x, w: rms_norm.rms_norm(x, w, 1e-6, rounds), leaves)
    for name, f, p, t in zip(("y", "dx", "dweight"), found, plain, truth, strict=True):
        assert_as_good(f, p, t, name)
    with torch.no_grad():
        assert torch.equal(rms_norm.rms_norm(*leaves, 1e-6, rounds), found[0])


@pytest.mark.parametrize("rounds", [True, False])
def test_rms_norm_of_half_precision_with_a_weight_in_full(rounds):
    leaves = normal(6, 40, dtype=HALF), normal(40)
    plain = gradients(lambda x, w: reference.rms_norm(x, w, 1e-6, rounds), leaves)
    found = gradients(lambda x, w: rms_norm.rms_norm(x, w, 1e-6, rounds), leaves)
    truth = gradients(lambda x, w: reference.rms_norm(x, w, 1e-6, rounds), leaves, torch.float64)
    for f, p, t in zip(found, plain, truth, strict=True):
        assert_as_good(f, p, t)


def test_what_is_frozen_costs_nothing(monkeypatch):
    x, weight = normal(4, 32).requires_grad_(), normal(32)
    parts = []
    original = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: parts.append(a[0]) or original(*a, **k))
    rms_norm.rms_norm(x, weight, 1e-6).sum().backward()
    assert parts == [(0, 32)]
    assert weight.grad is None
    weight.requires_grad_()
    rms_norm.rms_norm(x.detach(), weight, 1e-6).sum().backward()
    assert weight.grad is not None


LOGITS = {
    "plain": (5, 64),
    "off the block": (4, 100),
    "several blocks": (3, 5000),
    "one token": (1, 32),
    "no token": (0, 32),
}


@DTYPE
@pytest.mark.parametrize("size", LOGITS.values(), ids=LOGITS)
def test_cross_entropy(size, dtype):
    logits, target = normal(*size, dtype=dtype, scale=4.0), torch.arange(size[0], device=DEVICE) * 31 % size[1]
    target[1::3] = -100
    truth = gradients(lambda x: reference.cross_entropy(x, target), [logits], torch.float64)
    plain = gradients(lambda x: reference.cross_entropy(x.float(), target), [logits])
    poison()
    before = logits.clone()
    found = gradients(lambda x: cross_entropy(x, target), [logits])
    assert torch.equal(logits, before)
    for f, p, t in zip(found, plain, truth, strict=True):
        assert_as_good(f, p, t)
    assert not found[0][1::3].any()
    assert not found[1][1::3].any()


def test_cross_entropy_of_large_masked_and_strided_logits_and_of_labels_outside():
    logits = normal(5, 80, scale=3.0)[:, :64]
    logits[0], logits[1, 3:] = logits[0] * 1e4, -torch.inf
    target = torch.tensor([0, 2, 64, -1, 7], device=DEVICE)
    found, wanted = cross_entropy(logits, target, 7), reference.cross_entropy(logits[:2].double(), target[:2])
    torch.testing.assert_close(found[:2].double(), wanted, rtol=1e-5, atol=1e-5)
    assert found[2:4].isnan().all()
    assert found[4] == 0


CALLS = {
    "mean": {},
    "over all micro-batches": {"num_items_in_batch": 37},
    "over all, a tensor": {"num_items_in_batch": torch.tensor(37)},
    "another number to ignore": {"ignore_index": 5},
    "shifted already": {"shift_labels": torch.tensor([[1, 2, -100], [4, 5, 6]])},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_the_loss_is_that_of_transformers(options, kernels):
    options = {name: v.to(DEVICE) if torch.is_tensor(v) else v for name, v in options.items()}
    labels = None if "shift_labels" in options else torch.tensor([[1, 2, 5], [-100, 5, 3]], device=DEVICE)
    logits = normal(2, 3, 40)
    wanted, found = (
        gradients(lambda x, f=f: f(x, labels, 40, **options)[None], [logits])
        for f in (ForCausalLMLoss, stand_ins.causal_lm_loss)
    )
    assert kernels == ["cross_entropy"]
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss"])
def test_models_learn_the_same_with_stand_ins(name, kernels):
    model = build(name)
    theirs = step(model)
    accelerate(model)
    model.set_experts_implementation("grouped_mm")
    ours = step(model)
    assert {"rms_norm", "cross_entropy"} == set(kernels)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    used = len(kernels)
    step(restore(model))
    assert len(kernels) == used


def test_our_model_has_them_by_default(kernels, monkeypatch):
    from tiny import random_ids, tiny_model

    model, ids = tiny_model("gqa").to(DEVICE), random_ids(2, 9).to(DEVICE)
    model.set_experts_implementation("grouped_mm")

    def outcome():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    with monkeypatch.context() as patch:
        patch.setattr(stand_ins, "fused", lambda *_: None)
        theirs = outcome()
    monkeypatch.setattr(
        attention_hf_moe, "fused", lambda name, *tensors: stand_ins.fused(name) if name == "rms_norm" else None
    )
    ours = outcome()
    assert {"rms_norm", "cross_entropy"} == set(kernels)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=2e-5)


def test_operators_trace_in_one_graph():
    def loss(x, weight, target):
        y = torch.ops.hf_moe.rms_norm(x, weight, 1e-6, True)
        return torch.ops.hf_moe.cross_entropy(y, target, -100)[0].sum()

    leaves = [normal(5, 64).requires_grad_(), normal(64).requires_grad_()]
    target = torch.arange(5, device=DEVICE)
    wanted = torch.autograd.grad(loss(*leaves, target), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, target), leaves), wanted)
    for op, arguments in (("rms_norm", (*leaves, 1e-6, True)), ("cross_entropy", (leaves[0], target, -100))):
        torch.library.opcheck(getattr(torch.ops.hf_moe, op), arguments)


def test_checkpointed_norms():
    x, weight = normal(4, 32).requires_grad_(), nn.Parameter(normal(32, seed=1))

    def function(x):
        return rms_norm.rms_norm(x, weight, 1e-6).square()

    wanted = torch.autograd.grad(function(x).sum(), [x, weight])
    again = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), [x, weight]), wanted)
