"""Tiny random models of every variant, for all tests of the whole model."""

import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM

TINY = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}

# One entry for each way in which the model can differ; every test of the whole model runs over all of them.
VARIANTS: dict[str, dict] = {
    "deepseek_v3": {
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "rope_interleave": True,
    },
    "deepseek_v2": {
        "n_routed_experts": 8,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "rope_interleave": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 64,
        },
    },
    "gqa": {
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "kv_a_layernorm": False,
        "q_bias": True,
        "kv_bias": True,
        "o_bias": True,
        "tie_word_embeddings": True,
    },
    "head_norms": {
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 16,
        "kv_a_layernorm": False,
        "qk_norm": "head",
        "norm_placement": "post",
    },
    "widths": {
        "kv_lora_rank": 32,
        "kv_lora_ranks": [9, 32, 20],
        "rope_table_dim": 16,
        "qk_rope_head_dim": 12,
        "rope_frequencies": [[5], [0, 1, 2, 2, 3, 7], [0, 0, 4]],
        "softmax_scale": 0.25,
        "kv_a_layernorm": False,
    },
    "sandwich": {
        "num_key_value_heads": 4,
        "norm_placement": "sandwich",
        "embedding_multiplier": 8.0,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 15.0,
        "softmax_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "hidden_act": "gelu_pytorch_tanh",
    },
    "sinks": {
        "attention_sinks": True,
        "n_shared_experts": 2,
        "shared_expert_gate": True,
        "logits_scaling": 3.0,
        "q_lora_rank": 24,
        "q_a_layernorm": False,
    },
}


def tiny_config(variant: str = "deepseek_v3", **changes) -> HfMoeConfig:
    """Configuration of a model small enough for a test."""
    return HfMoeConfig(**{**TINY, **VARIANTS[variant], **changes})


def tiny_model(variant: str = "deepseek_v3", **changes) -> HfMoeForCausalLM:
    """A tiny model with seeded random weights, norms and biases included, in evaluation mode."""
    torch.manual_seed(0)
    model = HfMoeForCausalLM(tiny_config(variant, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def random_ids(batch_size: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids of a tiny model, none of them padding."""
    return torch.randint(1, TINY["vocab_size"], (batch_size, length), generator=torch.Generator().manual_seed(seed))
