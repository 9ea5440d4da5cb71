"""Whole models whose decode goes through the latent kernel, on every cache, against eager attention."""

import pytest
import torch
from cases import DEVICE
from tiny import VARIANTS, random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_moe.kernels import inference, latent_decode
from hf_moe.model import absorbed_hf_moe

# The interpreter is slow: sliding windows, soft-caps and groups of heads in one model.
NAMES = list(VARIANTS) if DEVICE == "cuda" else ["sandwich"]
CACHES = ["dynamic", "static", "offloaded", "offloaded_static"] if DEVICE == "cuda" else ["static"]
TOKENS = 8 if DEVICE == "cuda" else 3
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "disable_compile": True}


@pytest.fixture(params=NAMES)
def model(request):
    model = tiny_model(request.param).to(DEVICE)
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.fixture
def calls(monkeypatch):
    """The kernel's calls by name; without a GPU, the interpreter takes them where a GPU would."""
    calls = []
    for name in ("latent_decode", "latent_decode_packed"):
        function = getattr(latent_decode, name)

        def counted(*args, function=function, name=name, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(latent_decode, name, counted)
    if DEVICE == "cpu":
        chosen = lambda module, query: (  # noqa: E731
            inference.latent_attention if module.config._attn_implementation == "sdpa" else None
        )
        monkeypatch.setattr(absorbed_hf_moe, "latent_function", chosen)
    return calls


@pytest.mark.parametrize("cache", CACHES)
def test_generated_tokens_on_every_cache(model, calls, cache):
    ids = random_ids(2, 11).to(DEVICE)
    ids[0, :3] = 0
    mask = (ids != 0).long()
    model.set_attn_implementation("eager")
    expected = model.generate(ids, attention_mask=mask, cache_implementation="dynamic", **GREEDY)
    assert not calls
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY).equal(expected)
    assert len(calls) >= (TOKENS - 1) * model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_a_few_tokens_at_once(model, calls, padding):
    ids = random_ids(2, 24).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 20:]
    model.set_attn_implementation("sdpa")
    cache = model(ids[:, :20], attention_mask=mask[:, :20]).past_key_values
    logits = model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits
    assert "latent_decode" in calls
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_continuous_batching_reads_pages(model, calls):
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (7, 22, 45)]
    greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=98, pad_token_id=0)
    model.set_attn_implementation("eager")
    expected = [
        model.generate(torch.tensor([t], device=DEVICE), generation_config=greedy)[0, len(t) :].tolist() for t in texts
    ]
    model.set_attn_implementation("sdpa")
    pages = ContinuousBatchingConfig(num_blocks=32, page_size=8, max_batch_tokens=32)
    answers = model.generate_batch(
        texts, generation_config=greedy, continuous_batching_config=pages, warmup=False, progress_bar=False
    )
    assert [answers[f"req_{i}"].error for i in range(len(texts))] == [None] * len(texts)
    assert [answers[f"req_{i}"].generated_tokens for i in range(len(texts))] == expected
    assert "latent_decode_packed" in calls
