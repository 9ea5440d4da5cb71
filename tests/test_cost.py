"""The arithmetic against models that exist."""

import pytest
from tiny import VARIANTS, tiny_model

from hf_moe import cost

DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "topk_method": "noaux_tc",
}
DEEPSEEK_V2_LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_every_number_of_the_model(variant):
    model = tiny_model(variant)
    count = cost.parameters(model.config.to_dict())
    numbers = sum(p.numel() for p in model.parameters())
    numbers += sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert count.total == numbers


def test_published_models():
    count = cost.parameters(DEEPSEEK_V3)
    assert count.total == pytest.approx(671e9, rel=0.005)
    assert count.active - count.embedding == pytest.approx(37e9, rel=0.02)
    assert 2 * cost.cache_numbers(DEEPSEEK_V3) == 70_272
    # Published as 250 GFLOP a token in training at 4096.
    assert cost.training_flops(DEEPSEEK_V3, 4096) == pytest.approx(250e9, rel=0.05)
    count = cost.parameters(DEEPSEEK_V2_LITE)
    assert count.total == pytest.approx(15.7e9, rel=0.005)
    assert count.active - count.embedding == pytest.approx(2.4e9, rel=0.03)


def test_all_to_all():
    one_layer = {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 8, "hidden_size": 2048}
    assert cost.all_to_all_bytes(one_layer, tokens=4096, ranks=8) == 2 * 4096 * 8 * 2048 * 2 * 7 // 8
    assert cost.all_to_all_bytes(one_layer, tokens=4096, ranks=1) == 0
