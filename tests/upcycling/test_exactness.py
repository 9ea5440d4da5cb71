"""Logits, greedy decoding and cached decoding of the target against the source, for every family and mode."""

import pytest
import torch
from dense import DENSE, random_ids, save_dense
from transformers import AutoModelForCausalLM

from hf_moe.upcycling import upcycle

MODES = {
    "copy": {"mode": "copy", "experts": 4, "top_k": 2},
    "split": {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 12, "top_k": 6},
    "split_all_routed": {"mode": "split", "shards": 2, "experts": 6, "top_k": 2},
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

    ids = random_ids()
    expected, logits = dense(ids).logits, moe(ids).logits
    assert expected.std() > 0.1
    biased = any(key.endswith("proj.bias") for key in dense.state_dict())
    assert (logits - expected).abs().max() <= (2e-5 if biased else 1e-5)

    tokens, cached = decode(moe, ids, 8)
    assert torch.equal(tokens, decode(dense, ids, 8)[0])
    uncached = moe(torch.cat([ids, tokens[:, :-1]], dim=1), use_cache=False).logits[:, -8:]
    assert (cached - uncached).abs().max() <= 2e-5
