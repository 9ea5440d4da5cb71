"""Attention on latents against the formula in fp64's place: float32 truth, same-dtype baseline."""

import pytest
import torch
from cases import DEVICE

from hf_moe.kernels import reference
from hf_moe.kernels.latent_decode import latent_decode

# batch, heads, groups, queries, cached tokens, latent width, rotary width (0: no latent part in the scores)
SHAPES = {
    "one query": (2, 4, 1, 1, 70, 32, 16),
    "groups": (1, 6, 3, 1, 33, 48, 8),
    "several queries": (2, 4, 2, 3, 40, 24, 8),
    "more rows than a tile": (1, 40, 1, 2, 20, 16, 16),
    "one token": (1, 4, 1, 1, 1, 16, 8),
    "long": (1, 2, 1, 1, 1500, 16, 8),
}


def inputs(shape, dtype=torch.float32, nope=True, seed=0):
    B, H, G, S, L, C, P = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(DEVICE, dtype)  # noqa: E731
    return draw(B, H, S, C) if nope else None, draw(B, H, S, P), draw(B, 1, L, C), draw(B, 1, L, G * P)


def check(tensors, **options):
    out = latent_decode(*tensors, scaling=0.2, **options)
    exact = [t if t is None else t.double() for t in tensors]
    truth = reference.latent_decode(*exact, scaling=0.2, **options)
    plain = reference.latent_decode(*tensors, scaling=0.2, **options)
    assert out.isfinite().all()
    floor = 4 * torch.finfo(out.dtype).eps * truth.abs().max()
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nope", [True, False], ids=["latent keys", "rotary keys"])
def test_equals_formula(shape, nope):
    check(inputs(shape, nope=nope))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot multiply bfloat16")
    check(inputs(SHAPES["several queries"], dtype))


def test_padding_and_a_static_cache():
    tensors = inputs(SHAPES["one query"])
    mask = torch.zeros(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[0, ..., 5:40] = True
    mask[1, ..., :9] = True
    poisoned = [t.clone() for t in tensors]
    poisoned[2][:, :, 64:] = torch.nan  # tiles that nobody sees are not read
    out = latent_decode(*poisoned, scaling=0.2, attention_mask=mask)
    torch.testing.assert_close(out, reference.latent_decode(*tensors, scaling=0.2, attention_mask=mask))
    additive = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
    check(tensors, attention_mask=additive)


def test_a_query_that_sees_nothing_is_zero():
    tensors = inputs(SHAPES["one query"])
    mask = torch.zeros(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[1] = True
    out = latent_decode(*tensors, scaling=0.2, attention_mask=mask)
    assert (out[0] == 0).all()
    check(tensors, attention_mask=mask)


def test_sinks_softcap_and_masks_by_head():
    tensors = inputs(SHAPES["several queries"])
    mask = torch.rand(2, 4, 3, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
    check(tensors, attention_mask=mask, softcap=2.0, sinks_H=torch.linspace(-1, 3, 4, device=DEVICE))


def test_strided_cache():
    q_latent, q_rot, latent, k_rot = inputs(SHAPES["groups"])
    both = torch.cat((latent, k_rot), dim=-1)
    check((q_latent, q_rot, both[..., : latent.shape[-1]], both[..., latent.shape[-1] :]))
