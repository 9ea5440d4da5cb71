"""The model's fused kernels, each against its formula, and all of them in the whole model."""

import pytest
import torch
from cases import DEVICE, DTYPES
from tiny import VARIANTS, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from hf_moe.kernels import reference
from hf_moe.kernels.expert_choice import expert_choice
from hf_moe.kernels.latent_entry import latent_entry
from hf_moe.kernels.rms_norm import add_rms_norm, rms_norm
from hf_moe.model import attention_hf_moe, fused_hf_moe, modeling_hf_moe, routing_hf_moe
from hf_moe.model.fused_hf_moe import FUSED

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def draw(*size, dtype=torch.float32, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(out, plain, truth):
    """Twice the error of plain PyTorch in the same dtype, plus four roundings."""
    floor = 4 * torch.finfo(out.dtype).eps * truth.abs().max()
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


@DTYPE
@pytest.mark.parametrize("size", [(3, 64), (1, 1, 100), (0, 32), (2, 5, 1025)], ids=str)
def test_rms_norm(size, dtype):
    x, branch, weight = draw(*size, dtype=dtype), draw(*size, dtype=dtype, seed=1), draw(size[-1], dtype=dtype, seed=2)
    total, normed = add_rms_norm(x, branch, weight, 1e-6)
    assert torch.equal(total, x + branch)
    assert torch.equal(rms_norm(total, weight, 1e-6), normed)
    if x.numel():
        check(
            normed,
            reference.rms_norm(total, weight, 1e-6),
            reference.rms_norm(total.double(), weight.double(), 1e-6),
        )


# batch, queries, heads, groups, latent width, rotary width, position-free width
ENTRIES = {
    "deepseek": (2, 3, 4, 1, 32, 8, 16),
    "one token": (3, 1, 4, 1, 32, 8, 16),
    "groups, no position-free part": (2, 5, 6, 3, 24, 6, 0),
    "one token alone": (1, 1, 4, 1, 32, 8, 16),
    "odd widths": (1, 4, 5, 1, 50, 2, 7),
}


@DTYPE
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("shape", ENTRIES.values(), ids=ENTRIES)
def test_latent_entry(shape, interleave, dtype):
    B, S, H, G, C, P, N = shape
    query, latent_key = draw(B, S, H * (N + P), dtype=dtype), draw(B, S, C + G * P, dtype=dtype, seed=1)
    angles = draw(B, S, P // 2, seed=2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norm = draw(C, dtype=dtype, seed=3) if N else None
    options = {"heads": H, "nope": N, "latent_width": C, "eps": 1e-6, "interleave": interleave}
    found = latent_entry(query, latent_key, cos, sin, norm_C=norm, **options)
    plain = reference.latent_entry(query, latent_key, cos, sin, norm_C=norm, **options)
    wide = [t.double() for t in (query, latent_key, cos, sin)]
    truth = reference.latent_entry(*wide, norm_C=None if norm is None else norm.double(), **options)
    for out, same_dtype, exact in zip(found, plain, truth, strict=True):
        assert out.shape == exact.shape
        check(out, same_dtype, exact)

    slot, poison = 4, torch.nan
    cache = (draw(B, 1, S + 9, C, dtype=dtype).fill_(poison), draw(B, 1, S + 9, G * P, dtype=dtype).fill_(poison))
    # A full cache takes no more, and its neighbour none of it.
    full = [t[:, :, : slot + S - 1].clone() for t in cache]
    at = torch.tensor(slot, device=DEVICE)
    latent_entry(query, latent_key, cos, sin, norm_C=norm, cache=(*full, at), **options)
    for whole, new in zip(full, found[1:], strict=True):
        assert torch.equal(whole[:, :, slot:], new[:, :, : S - 1])
        assert whole[:, :, :slot].isnan().all()
    at = torch.tensor(slot, device=DEVICE)
    entered = latent_entry(query, latent_key, cos, sin, norm_C=norm, cache=(*cache, at), **options)
    assert int(at) == slot + S
    assert torch.equal(entered[0], found[0])
    for whole, new, own in zip(entered[1:], found[1:], cache, strict=True):
        assert whole is own
        assert torch.equal(whole[:, :, slot : slot + S], new)
        assert whole[:, :, :slot].isnan().all()
        assert whole[:, :, slot + S :].isnan().all()


ROUTERS = {
    "softmax": (7, 40, 6, 2, {"sigmoid": False, "normalise": True, "factor": 1.0}),
    "sigmoid and bias": (1, 64, 9, 3, {"sigmoid": True, "normalise": True, "factor": 2.5}),
    "groups by their best two": (5, 64, 12, 3, {"sigmoid": True, "groups": 4, "top_groups": 2, "normalise": True}),
    "groups by their best": (5, 64, 12, 4, {"sigmoid": False, "groups": 3, "top_groups": 2, "normalise": False}),
    "K=E": (3, 33, 4, 4, {"sigmoid": False, "normalise": True, "factor": 1.0}),
    "K=1": (3, 1100, 5, 1, {"sigmoid": False, "normalise": False, "factor": 1.0}),
    "T=0": (0, 32, 4, 2, {"sigmoid": False, "normalise": True, "factor": 1.0}),
}


@DTYPE
@pytest.mark.parametrize("case", ROUTERS.values(), ids=ROUTERS)
def test_expert_choice(case, dtype):
    T, D, E, K, options = case
    options = {"factor": 1.0} | options
    x, weight = draw(T, D, dtype=dtype), draw(E, D, dtype=dtype, seed=1)
    bias = draw(E, seed=2) if options["sigmoid"] else None
    logits, weights, index = expert_choice(x, weight, bias, top_k=K, **options)
    truth = reference.expert_choice(
        x.double(), weight.double(), None if bias is None else bias.double(), top_k=K, **options
    )
    assert torch.equal(index, truth[2])
    torch.testing.assert_close(logits, truth[0].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights, truth[1].float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_whole_model(name, monkeypatch):
    model, ids = tiny_model(name).to(DEVICE), random_ids(2, 9).to(DEVICE)
    model.set_experts_implementation("grouped_mm")
    modules, used = (attention_hf_moe, fused_hf_moe, modeling_hf_moe, routing_hf_moe), set()

    def steps(cache):
        logits = [model(ids[:, :6], past_key_values=cache).logits[:, -1]]
        return torch.stack(logits + [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in (6, 7, 8)])

    def fused(name, *tensors):
        def kernel(*args, **options):
            found = FUSED[name](*args, **options)
            if found is not None:
                used.add(name)
            return found

        return kernel

    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "fused", lambda *_: None)
        expected = steps(DynamicCache(config=model.config))
    for module in modules:
        monkeypatch.setattr(module, "fused", fused)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        torch.testing.assert_close(steps(cache), expected, rtol=1e-4, atol=1e-4)
    assert {"rms_norm", "expert_choice", "gated_mlp"} <= used
