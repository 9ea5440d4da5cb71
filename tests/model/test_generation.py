"""`generate` in all its forms against recomputing every token from the whole text, without a cache."""

import copy

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

NEW = 8


def recomputed(model, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Greedy continuation by one full pass for each token."""
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, **options)


OFFLOADS = pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache copies on CUDA streams")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", pytest.param("offloaded", marks=OFFLOADS)])
def test_greedy_with_each_cache(variant, kind):
    device = "cuda" if kind == "offloaded" else "cpu"
    model, ids = tiny_model(variant).to(device), random_ids(2, 17).to(device)
    assert greedy(model, ids, cache_implementation=kind, disable_compile=True).equal(recomputed(model, ids))


@torch.no_grad()
def test_caches_agree_under_autocast(variant):
    model, ids = tiny_model(variant), random_ids(2, 17)
    truth = model(ids).logits[:, 12:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (model(ids, use_cache=False).logits[:, 12:] - truth).norm()
        for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=20)):
            model(ids[:, :12], past_key_values=cache)
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 17)]
            assert (torch.cat(steps, dim=1) - truth).norm() < 2 * error
        assert greedy(model, ids, cache_implementation="static").shape == (2, 17 + NEW)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_of_embeddings(variant, kind, recorder):
    model, ids = tiny_model(variant), random_ids(2, 11)
    expected = recomputed(model, ids)[:, 11:]
    embeddings = model.get_input_embeddings()(ids)
    assert greedy(model, None, inputs_embeds=embeddings, cache_implementation=kind).equal(expected)
    recorder.on()
    assert greedy(model, None, inputs_embeds=embeddings).equal(expected)
    assert recorder.captures == 1


@torch.no_grad()
def test_embeddings_that_grow_beyond_longropes_first_length_are_refused(recorder):
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    model = tiny_model(rope_parameters=rope)
    recorder.on()
    for length, new in ((8, 8), (17, NEW)):
        ids = random_ids(1, length)
        embeddings = model.get_input_embeddings()(ids)
        expected = recomputed(model, ids, new)[:, length:]
        assert greedy(model, None, inputs_embeds=embeddings, max_new_tokens=new).equal(expected)
    with pytest.raises(ValueError, match=r"17\. token .* original_max_position_embeddings=16"):
        greedy(model, None, inputs_embeds=embeddings[:, :8], max_new_tokens=10)


class LosslessLayer(QuantizedLayer):
    """A quantised cache whose backend keeps every bit: what Transformers does around it is left."""

    def _quantize(self, tensor, axis):
        assert tensor.dim() == 4
        return tensor.shape, tensor.flatten().clone()

    def _dequantize(self, stored):
        return stored[1].view(stored[0])


@torch.no_grad()
def test_greedy_with_a_quantised_cache(variant):
    model, ids = tiny_model(variant, layer_types=None, sliding_window=None, rope_parameters=None), random_ids(2, 17)
    layers = [LosslessLayer(residual_length=3) for _ in range(model.config.num_hidden_layers)]
    assert greedy(model, ids, past_key_values=Cache(layers=layers)).equal(recomputed(model, ids))


@torch.no_grad()
def test_left_padded_batch_equals_single_texts(variant):
    model = tiny_model(variant)
    texts = [random_ids(1, length, seed=length) for length in (13, 9)]
    padded = torch.cat((texts[0], torch.cat((torch.zeros(1, 4, dtype=torch.long), texts[1]), dim=1)))
    mask = (padded != 0).long()
    out = greedy(model, padded, attention_mask=mask)
    for row, text in enumerate(texts):
        assert out[row, 13:].equal(recomputed(model, text)[0, text.shape[1] :])


@torch.no_grad()
def test_beams(variant):
    model, ids = tiny_model(variant), random_ids(2, 11)
    with_cache = greedy(model, ids, num_beams=3)
    assert with_cache.equal(greedy(model, ids, num_beams=3, use_cache=False))


@torch.no_grad()
def test_sampling_draws_from_the_same_distribution(variant):
    model, ids = tiny_model(variant), random_ids(2, 11)
    torch.manual_seed(3)
    with_cache = greedy(model, ids, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert with_cache.equal(greedy(model, ids, do_sample=True, top_k=20, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["assistant", "early_exit", "prompt_lookup"])
def test_assisted_decoding(variant, kind):
    model, ids = tiny_model(variant), random_ids(1, 12)
    if kind == "assistant":
        assistant = tiny_model(variant)
        for parameter in assistant.parameters():  # agrees often, not always
            parameter.mul_(1.01)
        options = {"assistant_model": assistant}
    elif kind == "early_exit":
        options = {"assistant_early_exit": 2}
    else:
        ids = torch.cat((ids, ids), dim=1)
        options = {"prompt_lookup_num_tokens": 3}
    assert greedy(model, ids, **options).equal(recomputed(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_prefix_is_reused(variant, kind):
    model, ids = tiny_model(variant), random_ids(1, 19)
    cache = DynamicCache(config=model.config) if kind is DynamicCache else StaticCache(model.config, max_cache_len=40)
    model(ids[:, :12], past_key_values=cache)
    assert greedy(model, ids, past_key_values=cache).equal(recomputed(model, ids))


@torch.no_grad()
def test_one_prefix_begins_several_texts(variant):
    model, ids = tiny_model(variant), random_ids(1, 12)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    for seed in (3, 4):
        text = torch.cat((ids, random_ids(1, 2 + seed, seed)), dim=1)
        assert greedy(model, text, past_key_values=copy.deepcopy(cache)).equal(recomputed(model, text))


@torch.no_grad()
def test_a_conversation_goes_on_in_its_cache(variant):
    model, ids = tiny_model(variant), random_ids(1, 9)
    cache = DynamicCache(config=model.config)
    for turn in (5, 6):
        ids = torch.cat((greedy(model, ids, past_key_values=cache), random_ids(1, 4, turn)), dim=1)
    assert greedy(model, ids, past_key_values=cache).equal(recomputed(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_texts_do_not_see_each_other(variant, implementation, use_cache):
    model = tiny_model(variant)
    model.set_attn_implementation(implementation)
    texts = [random_ids(1, length, seed=length) for length in (7, 4, 11)]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts]).unsqueeze(0)
    packed = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=use_cache).logits
    alone = torch.cat([model(text).logits for text in texts], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)


@torch.no_grad()
def test_cache_bytes_a_token_in_bfloat16(variant):
    model = tiny_model(variant).to(torch.bfloat16)
    cache = model(random_ids(1, 5)).past_key_values
    for layer, width in zip(cache.layers, model.config.cache_widths, strict=True):
        assert layer.keys.nbytes + layer.values.nbytes == 5 * 2 * width
