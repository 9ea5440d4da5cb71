"""Continuous batching gives `generate`'s tokens, from pages that hold latents."""

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=98, pad_token_id=0)
PAGES = {"num_blocks": 32, "page_size": 8, "max_batch_tokens": 32}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_tokens_are_those_of_generate(variant, implementation):
    model = tiny_model(variant)
    model.set_attn_implementation(implementation)
    # Of different lengths, one longer than a batch of tokens, two that share pages of a prefix.
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (7, 22, 45)]
    texts.append([*texts[1][:16], *texts[0]])
    expected = [model.generate(torch.tensor([t]), generation_config=GREEDY)[0, len(t) :].tolist() for t in texts]
    sizes = model.config.head_dim, model.config.num_key_value_heads
    answers = model.generate_batch(
        texts,
        generation_config=GREEDY,
        continuous_batching_config=ContinuousBatchingConfig(**PAGES),
        warmup=False,
    )
    assert [answers[f"req_{i}"].error for i in range(len(texts))] == [None] * len(texts)
    assert [answers[f"req_{i}"].generated_tokens for i in range(len(texts))] == expected
    assert (model.config.head_dim, model.config.num_key_value_heads) == sizes


def test_pages_are_sized_for_latents(variant):
    model = tiny_model(variant).to(torch.bfloat16)
    manager = model.init_continuous_batching(GREEDY, ContinuousBatchingConfig(**PAGES))
    manager.warmup()
    config = model.config
    numbers = config.kv_lora_rank + config.num_key_value_heads * config.qk_rope_head_dim
    assert numbers % 2 == 0
    for allocator in manager.batch_processor.cache.cache_allocators.values():
        assert allocator.bytes_per_page == PAGES["page_size"] * 2 * numbers


def test_what_has_no_answer_raises():
    model, texts = tiny_model(), [random_ids(1, length)[0].tolist() for length in (7, 22)]
    with pytest.raises(ValueError, match="no beams, got num_beams=2"):
        model.generate_batch(texts, generation_config=GenerationConfig(num_beams=2))
    too_small = ContinuousBatchingConfig(**PAGES | {"num_blocks": 2})
    with pytest.raises(RuntimeError, match="1 of 2 sequences failed: No requests can be scheduled"):
        model.generate_batch(texts, generation_config=GREEDY, continuous_batching_config=too_small, warmup=False)


@pytest.mark.parametrize("sequences", [1, 3])
def test_several_sequences_for_each_text(sequences):
    model, texts = tiny_model(), [random_ids(1, length)[0].tolist() for length in (7, 22)]
    sampled = GenerationConfig(
        max_new_tokens=6, do_sample=True, num_return_sequences=sequences, eos_token_id=98, pad_token_id=0
    )
    pages = ContinuousBatchingConfig(**PAGES)
    answers = model.generate_batch(texts, generation_config=sampled, continuous_batching_config=pages, warmup=False)
    assert len(answers) == 2 * sequences
    assert all(0 < len(answer.generated_tokens) <= 6 for answer in answers.values())


def test_kernel_reads_pages(variant, latent_kernel):
    test_tokens_are_those_of_generate(variant, "sdpa")
    assert latent_kernel.in_pages > 0
