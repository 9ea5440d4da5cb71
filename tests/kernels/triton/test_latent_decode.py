"""Attention on latents against the formula in fp64's place: float32 truth, same-dtype baseline."""

import pytest
import torch
from cases import DEVICE

from hf_moe.kernels import latent_hopper, reference
from hf_moe.kernels.latent_decode import latent_decode, latent_decode_packed

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


def check(tensors, function=latent_decode, lengths=None, **options):
    out = function(*tensors, scaling=0.2, **options, **(lengths or {}))
    exact = [t if t is None else t.double() for t in tensors]
    wide = {name: given.double() if name == "value_HVC" else given for name, given in options.items()}
    truth = getattr(reference, function.__name__)(*exact, scaling=0.2, **wide)
    plain = getattr(reference, function.__name__)(*tensors, scaling=0.2, **options)
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


def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("name", ["one query", "several queries", "more rows than a tile"])
def test_each_sequence_from_its_start_to_its_end(name, window):
    tensors = inputs(SHAPES[name])
    ends = integers(17, 33)[: SHAPES[name][0]]
    check(tensors, start_B=integers(5, 0)[: SHAPES[name][0]], end_B=ends, window=window)
    poisoned = [t.clone() for t in tensors]
    poisoned[2][:, :, 17 if SHAPES[name][0] == 1 else 33 :] = torch.nan  # what lies behind the end is not read
    assert latent_decode(*poisoned, scaling=0.2, end_B=ends, window=window).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"softcap": 2.0}, {"sinks_H": torch.zeros(4, device=DEVICE)}])
@pytest.mark.parametrize("name", ["one query", "several queries"])
def test_a_cache_that_took_too_many_tokens_gives_no_numbers(name, options):
    tensors = inputs(SHAPES[name])
    L = SHAPES[name][4]
    options = options | {"scaling": 0.2, "end_B": integers(L - 7, L + 1)}
    out, expected = latent_decode(*tensors, **options), reference.latent_decode(*tensors, **options)
    assert out[1].isnan().all()
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_one_end_for_all_beside_a_mask():
    tensors = inputs(SHAPES["one query"])
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[0, ..., :9] = False
    check(tensors, attention_mask=mask, end_B=torch.tensor([41], device=DEVICE))


def test_padding_with_causal_queries():
    tensors = inputs(SHAPES["several queries"])
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[0, ..., :9] = False
    check(tensors, attention_mask=mask, is_causal=True, window=20)


# Queries and keys of each sequence: decode steps, a whole prompt, a part of one, and the padding of a captured batch.
MIXED = {"query": (1, 5, 1, 3, 0, 0), "key": (18, 5, 1, 40, 0, 0)}


@pytest.mark.parametrize("page", [None, 4], ids=["packed", "in pages"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("widths", [(4, 1, 32, 16), (6, 3, 20, 4), (4, 2, 24, 7)], ids=["C32", "C20", "odd"])
def test_packed_sequences(page, window, widths):
    H, G, C, P = widths
    start = {name: integers(0, *torch.tensor(counts).cumsum(0).tolist()) for name, counts in MIXED.items()}
    T, L = sum(MIXED["query"]), sum(MIXED["key"])
    q_latent, q_rot, latent, k_rot = inputs((1, H, G, T, L, C, P))
    options = {"query_start": start["query"], "key_start": start["key"], "window": window}
    if page is not None:
        # As Transformers lays them: a page's first halves, then its second halves.
        half = (C + G * P + 1) // 2
        slots = torch.randperm(30 * page, generator=torch.Generator().manual_seed(3))[:L].to(DEVICE)
        slots += slots // page * page
        memory = torch.randn(61 * page, half, device=DEVICE)
        latent, k_rot = memory[:-page], memory[page:]
        options |= {"slot_L": slots, "latent_width": C, "rotary_width": G * P}
    longest = {"longest_query": max(MIXED["query"]), "longest_key": max(MIXED["key"])}
    check((q_latent, q_rot, latent, k_rot), latent_decode_packed, longest, **options)


def test_what_cannot_be_is_refused():
    tensors = inputs(SHAPES["one query"])
    mask = torch.ones(2, 1, 1, 69, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="69 long, and the cache 70"):
        latent_decode(*tensors, scaling=0.2, attention_mask=mask)
    with pytest.raises(ValueError, match="window=3"):
        latent_decode(*tensors, scaling=0.2, window=3, is_causal=False)


@pytest.mark.parametrize("name", ["one query", "groups", "several queries", "long", "one token"])
def test_values(name):
    """Few rows through one kernel, several through two; head weights in the middle of larger ones, as W_uv is."""
    tensors = inputs(SHAPES[name])
    H, C = tensors[0].shape[1], tensors[0].shape[3]
    weight = torch.randn(H, 12 + 20, C, generator=torch.Generator().manual_seed(4)).to(DEVICE)[:, 12:]
    check(tensors, value_HVC=weight, sinks_H=torch.linspace(-1, 3, H, device=DEVICE))
    if name == "one query":
        start = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
        packed = [x[:1] if x.shape[2] == 1 else x[:, 0].reshape(1, 1, -1, x.shape[-1]) for x in tensors]
        packed[:2] = [x.transpose(0, 2).reshape(1, H, 2, -1) for x in tensors[:2]]
        lengths = {"longest_query": 1, "longest_key": 70}
        options = {"query_start": start, "key_start": 70 * start, "value_HVC": weight}
        check(packed, latent_decode_packed, lengths, **options)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
# Through the copy engine: batch, heads, groups, queries, cached tokens, latent width, rotary width.
BULK = {
    "DeepSeek-V2-Lite": (2, 16, 1, 1, 5000, 512, 64),
    "DeepSeek-V3": (2, 128, 1, 1, 1000, 512, 64),
    "several queries": (2, 32, 1, 3, 1000, 512, 64),
    "groups and odd widths": (2, 64, 2, 2, 900, 96, 24),
    "narrow": (9, 20, 1, 1, 1000, 40, 8),
    "wide keys": (2, 20, 1, 1, 700, 512, 128),
}


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", BULK)
def test_bulk_copies(name, monkeypatch):
    calls = []
    attend = latent_hopper.attend
    monkeypatch.setattr(latent_hopper, "attend", lambda *args: calls.append(args) or attend(*args))
    B, H, _, _, L, C, _ = BULK[name]
    dtype = torch.float16 if name == "narrow" else torch.bfloat16
    tensors = inputs(BULK[name], dtype)
    starts, ends = integers(*range(5, 5 + B)), integers(*range(L - B, L))
    check(tensors)
    check(tensors, start_B=starts, end_B=ends, window=200, softcap=2.0, sinks_H=torch.linspace(-1, 3, H, device=DEVICE))
    holes = torch.rand(B, 1, 1, L, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.6
    holes[0] = False
    check(tensors, attention_mask=holes)
    padding = (torch.arange(L, device=DEVICE) >= starts[:, None] * 30)[:, None, None]
    check(tensors, attention_mask=padding, end_B=ends[:1])
    check(tensors, value_HVC=torch.randn(H, 16, C, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype))
    over = integers(*range(L + 2 - B, L + 2))
    assert latent_decode(*tensors, scaling=0.2, end_B=over)[-1].isnan().all()
    assert len(calls) == 6
    poisoned = [t.clone() for t in tensors]
    poisoned[2][:, :, 640:] = torch.nan
    assert latent_decode(*poisoned, scaling=0.2, end_B=integers(600)).isfinite().all()
