"""Attention functions other than PyTorch's own, and torch.compile."""

import shutil

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.masking_utils import eager_mask

from hf_moe.model.attention_hf_moe import HfMoeAttention


def plain_attention(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
    """All that an attention function is told, by its arguments alone."""
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None


@torch.no_grad()
def test_a_registered_function_is_told_everything(variant):
    model, ids = tiny_model(variant), random_ids(2, 13)
    expected = model(ids).logits
    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", eager_mask)
    model.set_attn_implementation("plain")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention compiles C++ on a CPU")
@pytest.mark.filterwarnings("default")  # of the compiler about itself
def test_flex_attention():
    model, ids = tiny_model("sandwich", num_hidden_layers=1, layer_types=["sliding_attention"]), random_ids(2, 13)
    expected = model(ids).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("sinks", {}, "no attention sinks"),
        ("gqa", {"v_head_dim": 24}, "v_head_dim=24 and qk_nope_head_dim .* qk_rope_head_dim=16"),
    ],
)
def test_flash_attention_is_refused_where_it_would_leave_something_out(variant, changes, message):
    config = tiny_config(variant, **changes)
    config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=message):
        HfMoeAttention(config, 1).attention_function()


@torch.no_grad()
@pytest.mark.filterwarnings("default")
def test_forward_compiles_to_one_graph(variant):
    model, ids = tiny_model(variant), random_ids(2, 12)
    model.set_experts_implementation("grouped_mm")
    expected = model(ids).logits
    torch._dynamo.reset()
    logits = torch.compile(model.forward, fullgraph=True, backend="eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.filterwarnings("default")
def test_static_decoding_compiles_once(variant):
    model, ids = tiny_model(variant), random_ids(2, 20)
    model.set_experts_implementation("grouped_mm")
    expected = model(ids).logits
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :5], past_key_values=cache)
    graphs, logits = [], []
    for i in range(5, 20):
        position = torch.full((2, 1), i)
        logits.append(step(input_ids=ids[:, i : i + 1], past_key_values=cache, position_ids=position).logits)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, 5:], rtol=0, atol=2e-5)
    # A sliding cache compiles once more, when its window is full.
    assert graphs[-1] <= 1 + ("sliding_attention" in model.config.layer_types)
    assert graphs[2:] == [graphs[-1]] * len(graphs[2:])
