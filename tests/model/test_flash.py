"""FlashAttention, which is not installed here: Transformers' own calls of it, on its interface in plain PyTorch."""

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers import modeling_flash_attention_utils as flash

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False, s_aux=None,
):  # fmt: skip
    """Attention within each of several texts laid end to end: q (tokens, H, P), masked from the bottom right."""
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        scores = torch.einsum("qhp,khp->hqk", q[rows], k[keys]).double() * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        _, s, length = scores.shape
        behind = torch.arange(length - s, length)[:, None] - torch.arange(length)
        hidden = (behind < 0) & causal
        if window_size[0] >= 0:
            hidden |= behind > window_size[0]
        scores = scores.masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            scores = torch.cat((scores, s_aux[:, None, None].expand(-1, s, 1)), -1)
        out[rows] = torch.einsum("hqk,khv->qhv", scores.softmax(-1)[..., :length].to(v.dtype), v[keys])
    return out


def flash_attn_func(q, k, v, **options):
    """The same for texts of one length: q (B, S, H, P)."""
    lengths = {f"cu_seqlens_{n}": torch.arange(len(x) + 1) * x.shape[1] for n, x in (("q", q), ("k", k))}
    longest = {f"max_seqlen_{n}": x.shape[1] for n, x in (("q", q), ("k", k))}
    out = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **longest, **options)
    return out.unflatten(0, q.shape[:2])


@pytest.fixture
def model(variant, monkeypatch):
    """A model whose `use_flash` does what `set_attn_implementation` does where the package is."""
    functions = flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input
    options = flash._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, (options, dict)))
    model = tiny_model(variant)
    name = "flash_attention_3" if model.config.attention_sinks else "flash_attention_2"
    model.use_flash = lambda: setattr(model.config, "_attn_implementation_internal", name)
    return model


@torch.no_grad()
def test_logits_of_whole_padded_and_packed_texts(model):
    texts = [random_ids(1, length, seed=length) for length in (7, 4, 11)]
    expected = [model(text).logits for text in texts]
    model.use_flash()
    for text, logits in zip(texts, expected, strict=True):
        torch.testing.assert_close(model(text).logits, logits, rtol=0, atol=2e-5)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts]).unsqueeze(0)
    packed = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(expected, dim=1), rtol=0, atol=2e-5)
    padded = torch.zeros(3, 11, dtype=torch.long)
    for row, text in zip(padded, texts, strict=True):
        row[-text.shape[1] :] = text
    mask = (padded != 0).long()
    logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for row, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-wanted.shape[1] :], wanted[0], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}])
def test_generated_tokens(model, options):
    ids = random_ids(2, 11)
    ids[0, :3] = 0
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    model.use_flash()
    assert model.generate(ids, attention_mask=mask, **GREEDY, **options).equal(expected)


def test_continuous_batching(model):
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (7, 22)]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=98, pad_token_id=0)
    expected = [model.generate(torch.tensor([t]), generation_config=greedy)[0, len(t) :].tolist() for t in texts]
    model.use_flash()
    pages = ContinuousBatchingConfig(num_blocks=32, page_size=8, max_batch_tokens=32)
    answers = model.generate_batch(
        texts, generation_config=greedy, continuous_batching_config=pages, warmup=False, progress_bar=False
    )
    assert [answers[f"req_{i}"].error for i in range(len(texts))] == [None] * len(texts)
    assert [answers[f"req_{i}"].generated_tokens for i in range(len(texts))] == expected


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_decode_through_the_latent_kernel(model, latent_kernel, options):
    test_generated_tokens(model, options)
    assert latent_kernel.calls >= 7 * model.config.num_hidden_layers
    if model.config.sliding_window is None:
        # A few tokens to verify, as speculation has them.
        ids = random_ids(2, 20)
        cache = model(ids[:, :15]).past_key_values
        before = latent_kernel.calls
        torch.testing.assert_close(
            model(ids[:, 15:18], past_key_values=cache).logits, model(ids[:, :18]).logits[:, 15:], rtol=0, atol=2e-5
        )
        assert latent_kernel.calls > before


def test_continuous_batching_through_the_latent_kernel(model, latent_kernel):
    test_continuous_batching(model)
    assert latent_kernel.in_pages > 0
