"""Latent attention: both forms against a loop over the formula, every cache, the size of what is cached."""

import pytest
import torch
from tiny import TINY, random_ids, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from hf_moe.model import absorbed_hf_moe
from hf_moe.model.absorbed_hf_moe import absorbed_attention, absorption_pays
from hf_moe.model.attention_hf_moe import HfMoeAttention
from hf_moe.model.rotary_hf_moe import HfMoeRotaryEmbedding


def attention_inputs(variant: str, query_length: int, seen: int, **changes):
    """A layer in float64, hidden states of `seen` + `query_length` tokens, and their rotary tables."""
    torch.manual_seed(0)
    config = tiny_config(variant, **changes)
    config._attn_implementation = "eager"
    layer = HfMoeAttention(config, layer_idx=1).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, seen + query_length, TINY["hidden_size"], dtype=torch.float64)
    rotary = HfMoeRotaryEmbedding(config)
    positions = torch.arange(seen + query_length).unsqueeze(0)
    tables = {layer_type: rotary(x, positions, layer_type) for layer_type in rotary.layer_types}
    return layer, x, rotary.of_layers(tables)[1]


def formula(layer: HfMoeAttention, x: torch.Tensor, rope) -> torch.Tensor:
    """The class's docstring, one head and one query at a time."""
    config = layer.config
    query, latent, k_rot = layer.project(x, rope)
    n, p, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    w = layer.kv_b_proj.weight.view(config.num_attention_heads, n + v, -1)
    out = torch.zeros(x.shape[0], x.shape[1], config.num_attention_heads, v, dtype=x.dtype)
    for b in range(x.shape[0]):
        for h in range(config.num_attention_heads):
            group = h * config.num_key_value_heads // config.num_attention_heads
            keys = torch.cat((latent[b, 0] @ w[h, :n].T, k_rot[b, 0].unflatten(-1, (-1, p))[:, group]), dim=-1)
            for t in range(x.shape[1]):
                score = keys[: t + 1] @ query[b, h, t] * layer.scaling
                if config.attn_logit_softcapping:
                    score = config.attn_logit_softcapping * torch.tanh(score / config.attn_logit_softcapping)
                if layer.sinks is not None:
                    score = torch.cat((score, layer.sinks[h : h + 1]))
                weight = score.softmax(0)[: t + 1]
                out[b, t, h] = weight @ (latent[b, 0, : t + 1] @ w[h, n:].T)
    return layer.o_proj(out.flatten(2))


@torch.no_grad()
def test_expanded_form_is_the_formula(variant):
    layer, x, rope = attention_inputs(variant, query_length=7, seen=0)
    assert not absorption_pays(layer, *layer.project(x, rope)[:2], None)
    torch.testing.assert_close(layer(x, rope, None)[0], formula(layer, x, rope), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("query_length", [1, 3])
def test_absorbed_form_is_the_formula(variant, query_length):
    layer, x, rope = attention_inputs(variant, query_length, seen=29)
    query, latent, k_rot = layer.project(x, rope)
    query = query[:, :, -query_length:]
    mask = torch.ones(query_length, latent.shape[2], dtype=torch.bool).tril(29)[None, None]
    assert absorption_pays(layer, query, latent, mask)
    out, _ = absorbed_attention(layer, query, latent, k_rot, mask, 0.0)
    out = layer.o_proj(out.reshape(*out.shape[:2], -1))
    torch.testing.assert_close(out, formula(layer, x, rope)[:, -query_length:], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_absorbed_form_on_a_cpu_without_16_bit_products(variant, dtype, monkeypatch):
    layer, x, rope = attention_inputs(variant, query_length=1, seen=63)
    layer.to(dtype)
    rounded = [t.to(dtype) for t in layer.project(x.to(dtype), tuple(t.to(dtype) for t in rope))]
    errors = {}
    for has_products in (True, False):
        monkeypatch.setattr(absorbed_hf_moe, "_is_multiplied", lambda _, answer=has_products: answer)
        query, latent, k_rot = rounded
        out, weights = absorbed_attention(layer, query[:, :, -1:], latent, k_rot, None, 0.0)
        assert out.dtype == weights.dtype == dtype
        query, latent, k_rot = (t.double() for t in rounded)
        truth, _ = absorbed_attention(layer.double(), query[:, :, -1:], latent, k_rot, None, 0.0)
        layer.to(dtype)
        errors[has_products] = (out - truth).abs().max()
    assert 0 < errors[False] <= errors[True]


class Copies(TorchDispatchMode):
    """Sizes of the tensors that hold another's numbers in memory of their own."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::contiguous"):
            self.sizes.append(out.numel())
        return out


@torch.no_grad()
def test_absorbed_form_copies_neither_cache_nor_weight(variant):
    layer, x, rope = attention_inputs(variant, query_length=1, seen=63)
    query, latent, k_rot = layer.project(x, rope)
    with Copies() as copies:
        absorbed_attention(layer, query[:, :, -1:], latent, k_rot, None, 0.0)
    assert max(copies.sizes, default=0) < min(latent.numel(), k_rot.numel(), layer.kv_b_proj.weight.numel())


@torch.no_grad()
def test_absorption_leaves_wrapped_projections_alone():
    layer, x, rope = attention_inputs("deepseek_v3", query_length=1, seen=29)
    query, latent, _ = layer.project(x, rope)
    query = query[:, :, -1:]
    assert absorption_pays(layer, query, latent, None)
    layer.kv_b_proj = torch.nn.Sequential(layer.kv_b_proj)
    assert not absorption_pays(layer, query, latent, None)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps_equal_one_pass(variant, kind):
    model, ids = tiny_model(variant), random_ids(2, 20)
    expected = model(ids).logits
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=24)
    steps = [ids[:, :9], ids[:, 9:12], *ids[:, 12:].split(1, dim=1)]
    logits = torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


class RoundedLayer(DynamicLayer):
    """What an 8-bit cache gives back: everything rounded at the first tokens' scale, those first tokens as they are."""

    def update(self, key_states, value_states, *args, **kwargs):
        given = key_states, value_states
        first = not self.is_initialized
        if first:
            self.scales = [x.abs().amax() / torch.finfo(torch.float8_e4m3fn).max for x in given]
        rounded = [(x / s).to(torch.float8_e4m3fn).float() * s for x, s in zip(given, self.scales, strict=True)]
        kept = super().update(*rounded)
        return given if first else kept


@torch.no_grad()
def test_eight_bit_cache(variant):
    model, ids = tiny_model(variant), random_ids(2, 14)
    if model.config.sliding_window is not None:
        pytest.skip("Transformers' quantised caches have no sliding windows")
    caches = QuantizedCache(backend="fp8", config=model.config), DynamicCache(config=model.config)
    caches[1].layers = [RoundedLayer() for _ in caches[1].layers]
    for step in (ids[:, :9], ids[:, 9:12], ids[:, 12:13], ids[:, 13:]):
        logits, expected = (model(step, past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for layer, width in zip(caches[0].layers, model.config.cache_widths, strict=True):
        assert (layer._quantized_keys[0].nbytes + layer._quantized_values[0].nbytes) // ids.numel() == width


@torch.no_grad()
def test_cache_holds_latents_and_rotary_keys_only(variant):
    model = tiny_model(variant)
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    for layer, width in zip(cache.layers, model.config.cache_widths, strict=True):
        assert (layer.keys.numel() + layer.values.numel()) // 5 == width


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padding_changes_nothing(variant, implementation):
    model, ids = tiny_model(variant), random_ids(1, 11)
    model.set_attn_implementation(implementation)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(15) >= 4).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(out, model(ids).logits, rtol=0, atol=2e-5)


@torch.no_grad()
def test_eager_equals_sdpa(variant):
    model, ids = tiny_model(variant), random_ids(2, 13)
    model.set_attn_implementation("sdpa")
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)
