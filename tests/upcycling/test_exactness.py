"""Logits, greedy decoding and cached decoding of the target against the source, for every family and mode."""

import pytest
import torch
from dense import DENSE, random_ids, save_dense
from transformers import AutoModelForCausalLM

from hf_moe.upcycling import upcycle

FACTOR = {"mode": "split", "shards": 4, "experts": 8, "top_k": 4, "split_scale": "factor"}
MODES = {
    "copy": {"mode": "copy", "experts": 4, "top_k": 2},
    "split": {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 12, "top_k": 6},
    "split_all_routed": {"mode": "split", "shards": 2, "experts": 6, "top_k": 2},
    "split_scaled_factor": FACTOR,
    "split_scaled_down": {"mode": "split", "shards": 4, "experts": 8, "top_k": 4, "split_scale": "down"},
    "attention_only": {"experts": 1},
}


@torch.no_grad()
def decode(model, ids, steps):
    """Greedy ids and their logits, from the cache."""
    current, cache, tokens, logits = ids, None, [], []
    for _ in range(steps):
        output = model(input_ids=current, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
        current = logits[-1].argmax(-1, keepdim=True)
        tokens.append(current)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)


@pytest.mark.parametrize("length", [50, 63, 64, 65])
@torch.no_grad()
def test_generation_across_the_length_at_which_a_rope_changes(tmp_path, length):
    """Keys that were cached with longrope's short factors are computed anew, as Transformers' Phi-3 does at 64."""
    source = save_dense(tmp_path / "dense", "phi3_longrope")
    pair = load_pair(source, upcycle(source, tmp_path / "moe", experts=2, progress=False))
    ids = random_ids(length, 1)
    choices = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    theirs, ours = (model.generate(ids, **choices) for model in pair)
    assert torch.equal(theirs, ours)


def load_pair(source, target):
    """Source and target in fp32."""
    pair = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (source, target)]
    assert type(pair[1]).__name__ == "HfMoeForCausalLM"
    return pair


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_target_equals_source(tmp_path, name, mode):
    source = save_dense(tmp_path / "dense", name)
    target = upcycle(source, tmp_path / "moe", progress=False, **MODES[mode])
    dense, moe = load_pair(source, target)

    # Above 64 positions longrope changes its factors.
    ids = random_ids(80 if name == "phi3_longrope" else 24)
    expected, logits = dense(ids).logits, moe(ids).logits
    assert expected.std() > 0.1
    biased = any(key.endswith("proj.bias") for key in dense.state_dict())
    assert (logits - expected).abs().max() <= (2e-5 if biased else 1e-5)

    tokens, cached = decode(moe, ids, 8)
    assert torch.equal(tokens, decode(dense, ids, 8)[0])
    uncached = moe(torch.cat([ids, tokens[:, :-1]], dim=1), use_cache=False).logits[:, -8:]
    assert (cached - uncached).abs().max() <= 2e-5


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "granite", "granite_biases", "llama_biases", "phi3_partial"])
@torch.no_grad()
def test_bfloat16_source_is_exact_in_float32(tmp_path, name):
    # What cannot be written in 16 bits (norm + 1, folded biases, a residual factor) must not be rounded to them.
    source = save_dense(tmp_path / "dense", name, dtype=torch.bfloat16)
    target = upcycle(source, tmp_path / "moe", experts=3, progress=False)
    dense, moe = load_pair(source, target)
    ids = random_ids()
    assert (moe(ids).logits - dense(ids).logits).abs().max() <= 2e-5


@torch.no_grad()
def test_dense_layers_stay_dense(tmp_path):
    source = save_dense(tmp_path / "dense")
    target = upcycle(source, tmp_path / "moe", dense_layers=(0, 2), experts=3, progress=False)
    dense, moe = load_pair(source, target)
    assert moe.config.mlp_layer_types == ["dense", "sparse", "dense"]
    ids = random_ids()
    assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_a_scale_on_gate_and_up_is_wrong(tmp_path):
    """silu(s·x) is not s·silu(x): of the two places for a shard's scale, only one keeps the function."""
    source = save_dense(tmp_path / "dense")
    target = upcycle(source, tmp_path / "moe", progress=False, **FACTOR)
    dense, moe = load_pair(source, target)
    ids = random_ids()
    expected, factor = dense(ids).logits, 4.0
    for layer in moe.model.layers:
        assert layer.mlp.gate.routed_scaling_factor == factor
        layer.mlp.gate.routed_scaling_factor = 1.0
        layer.mlp.experts.down_proj.mul_(factor)
    assert (moe(ids).logits - expected).abs().max() <= 1e-5
    for layer in moe.model.layers:
        layer.mlp.experts.down_proj.div_(factor)
        layer.mlp.experts.gate_up_proj.mul_(factor**0.5)
    assert (moe(ids).logits - expected).abs().max() >= 1e-2
