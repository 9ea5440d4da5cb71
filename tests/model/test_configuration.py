"""What a configuration refuses, what it says to Transformers, and every kind of rope against another class."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_moe import HfMoeConfig, HfMoeModel
from hf_moe.model.rotary_hf_moe import HfMoeRotaryEmbedding

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}


def test_every_rope_of_transformers_is_tried():
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rope_tables_are_llamas(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    ours = HfMoeRotaryEmbedding(tiny_config(rope_parameters=dict(rope)))
    llama = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(rope))
    theirs = LlamaRotaryEmbedding(llama)
    for length in (10, 400, 20):  # dynamic kinds change with the longest text seen
        positions, x = torch.arange(length).unsqueeze(0), torch.zeros(1)
        for mine, expected in zip(ours(x, positions), theirs(x, positions), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_a_model_that_is_cast_keeps_its_frequencies():
    rotary, positions = HfMoeRotaryEmbedding(tiny_config("sandwich")), torch.arange(100_000, 100_050).unsqueeze(0)
    tables = lambda: [rotary(torch.zeros(1), positions, layer_type) for layer_type in rotary.layer_types]  # noqa: E731
    expected = tables()
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double):
        cast(rotary)
        torch.testing.assert_close(tables(), expected, rtol=0, atol=0, msg=cast.__name__)
    rotary.to("meta")
    assert all(buffer.is_meta and buffer.dtype == torch.float32 for buffer in rotary.buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads=6 .* num_key_value_heads=4"),
        ({"n_routed_experts": 60, "n_group": 8}, "n_routed_experts=60 is not divisible by n_group=8"),
        ({"topk_group": 5}, "topk_group=5 is above n_group=4"),
        ({"topk_each_group": True, "num_experts_per_tok": 6}, "num_experts_per_tok=6 is not divisible by n_group=4"),
        ({"topk_each_group": True, "topk_method": "group_limited_greedy"}, "takes every group, .* only some"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is above the 4 experts .*n_routed_experts=8"),
        ({"n_routed_experts": 4}, "n_routed_experts=4 in n_group=4 leaves one"),
        ({"kv_lora_rank": -1}, "kv_lora_rank=-1 must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1"),
        ({"qk_nope_head_dim": -2}, "qk_nope_head_dim=-2 must be at least 0"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        ({"sliding_window": -3}, "sliding_window=-3 must be at least 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be at least 0"),
        ({"softmax_scale": 0.0}, "softmax_scale=0.0 must be above 0"),
        ({"logits_scaling": 0.0}, "logits_scaling=0.0 must be above 0"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must be at least 0 and below 1"),
        ({"pad_token_id": 99}, "pad_token_id=99 is no token of vocab_size=99"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta=-5.0 .* must be above 0"),
        ({"qk_norm": "head"}, "qk_norm='head' needs qk_nope_head_dim=0, got 16"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers=3"),
        ({"mlp_layer_types": ["dense"] * 2}, "mlp_layer_types names 2 layers, num_hidden_layers=3"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window=None"),
        ({"shared_expert_gate": True, "n_shared_experts": 0}, "shared_expert_gate=True needs n_shared_experts"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type='spiral' is none of"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}}, "factor=0.5 .* at least 1"),
        (
            {
                "rope_parameters": {
                    **ROPES["longrope"],
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "long_factor": [1.0],
                }
            },
            "long_factor has 1 numbers for qk_rope_head_dim=8",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5: all of qk_rope_head_dim=8 rotates",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            r"rope_parameters has \['sliding_attention'\] but not \['full_attention'\]",
        ),
        ({"kv_lora_ranks": [8, 8]}, "kv_lora_ranks names 2 layers, num_hidden_layers=3"),
        ({"kv_lora_ranks": [8, 33, 8]}, "kv_lora_ranks has 33 in layer 1, not 1 to kv_lora_rank=32"),
        ({"rope_frequencies": [[0], [], [1]]}, "0 pairs in layer 1, not 1 to half of qk_rope_head_dim=8"),
        ({"rope_frequencies": [[0], [4], [1]]}, "4 to 4 in layer 1, a table of rope_table_dim=8 holds 0 to 3"),
        ({"rope_table_dim": 16}, "rope_table_dim=16 is not qk_rope_head_dim=8"),
        (
            {"kv_lora_ranks": [8, 8, 8], "num_nextn_predict_layers": 1},
            "kv_lora_ranks leaves out num_nextn_predict_layers=1",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_numbers(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**changes)


def test_two_names_of_one_option_have_one_number():
    assert tiny_config(num_experts=8, n_routed_experts=8).n_routed_experts == 8
    with pytest.raises(ValueError, match="num_experts=8 and n_routed_experts=16 are one option"):
        tiny_config(num_experts=8, n_routed_experts=16)


@pytest.mark.parametrize("changes", [{"kv_lora_rank": "512"}, {"scoring_func": "relu"}, {"norm_placement": "side"}])
def test_types_are_strict(changes):
    with pytest.raises(StrictDataclassError):
        HfMoeConfig(**changes)


def test_rope_without_its_parameters_is_refused():
    with pytest.raises(KeyError, match="factor"):
        tiny_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})


def test_others_find_what_they_ask_for(variant):
    config = tiny_config(variant)
    assert config.num_experts == config.num_local_experts == config.n_routed_experts
    assert config.num_experts_per_tok
    assert config.moe_intermediate_size
    assert HfMoeModel.is_backend_compatible()
    assert HfMoeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_layers_may_differ_in_what_they_cache():
    config = tiny_config("widths")
    assert config.cache_widths == [9 + 2, 32 + 12, 20 + 6]
    assert config.latent_widths == [9, 32, 20]
    assert config.rotary_widths == [2, 12, 6]
    table = HfMoeRotaryEmbedding(config)(torch.zeros(1), torch.arange(5).unsqueeze(0))
    assert table[0].shape == (1, 5, 16)
    cos, sin = HfMoeRotaryEmbedding(config).of_layers({None: table})[2]
    torch.testing.assert_close(cos, table[0][..., [0, 0, 4, 0, 0, 4]], rtol=0, atol=0)
    torch.testing.assert_close(sin, table[1][..., [0, 0, 4, 0, 0, 4]], rtol=0, atol=0)
