"""DeepSeek-V2, V2-Lite, V3, Moonlight, Kimi-K2 and GLM-4-MoE-Lite folders against Transformers' own classes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from hf_moe import HfMoeConfig, HfMoeForCausalLM, HfMoeForSequenceClassification, HfMoeModel

TINY = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
# The fields of the published config.json that differ between the families.
FAMILIES = {
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "q_lora_rank": 24,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "moe_layer_freq": 1,
        "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "attention_bias": True,
    },
    "moonlight": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "rope_theta": 50000.0,
        "tie_word_embeddings": True,
    },
    "kimi_k2": {
        "model_type": "kimi_k2",
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50000.0,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe_lite": {
        "model_type": "glm4_moe_lite",
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 1.0},
    },
}


def make_folder(folder, family: str, fused: bool = False, **changes):
    """A checkpoint of random weights as that family publishes it, and Transformers' own model of it."""
    torch.manual_seed(0)
    config = {**TINY, **FAMILIES[family], **changes}
    own_type = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": own_type})).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if "norm" in name or "bias" in name:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    theirs.save_pretrained(folder, save_original_format=not fused)
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_own_class(family, fused, tmp_path):
    theirs, ids = make_folder(tmp_path, family, fused), random_ids(2, 80)
    has_single_experts = any(".experts.0." in key for key in load_file(tmp_path / "model.safetensors"))
    assert has_single_experts is not fused
    ours = HfMoeForCausalLM.from_pretrained(tmp_path)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    # Absorbed, cached decoding of theirs and ours.
    tokens = theirs.generate(ids[:, :20], max_new_tokens=12, do_sample=False)
    assert ours.generate(ids[:, :20], max_new_tokens=12, do_sample=False).equal(tokens)

    # Saved again it is an hf_moe checkpoint, with the same numbers.
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "hf_moe"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is HfMoeForCausalLM
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_prediction_layers_draft_as_those_of_the_own_class(layers, tmp_path):
    theirs = make_folder(tmp_path, "deepseek_v3", num_nextn_predict_layers=layers, num_mtp_layers=layers)
    tensors = load_file(tmp_path / "model.safetensors")
    last = {key: value for key, value in tensors.items() if "layers.2." in key}
    for layer in range(3, 3 + layers):
        tensors |= {key.replace("layers.2.", f"layers.{layer}."): value * 1.01 for key, value in last.items()}
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": torch.rand(64) + 0.5 for name in ("enorm", "hnorm", "shared_head.norm")}
        tensors[f"{prefix}.eh_proj.weight"] = torch.randn(64, 128) * 0.1
        tensors[f"{prefix}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours, ids = HfMoeForCausalLM.from_pretrained(tmp_path), random_ids(1, 9)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)

    config = AutoConfig.for_model(**json.loads((tmp_path / "config.json").read_text()))
    theirs = type(theirs).from_pretrained(tmp_path, config=config)
    # Their class knows the layers of the published size only.
    theirs._keys_to_ignore_on_load_unexpected = ours._keys_to_ignore_on_load_unexpected
    hidden = ours(ids, output_hidden_states=True).hidden_states[-1]
    drafts = []
    for model in (theirs, ours):
        drafter = MtpModel.from_pretrained(model).eval()
        cache = MtpCache(config=model.config.get_mtp_config())
        drafts.append(drafter(ids, hidden, None, torch.arange(1, 10).unsqueeze(0), cache)[:2])
    assert drafts[0][0].equal(drafts[1][0])
    torch.testing.assert_close(drafts[1][1], drafts[0][1], rtol=0, atol=1e-5)

    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert ours.generate(ids, use_mtp=True, **options).equal(ours.generate(ids, **options))

    ours.save_pretrained(tmp_path / "again")
    assert HfMoeConfig.from_pretrained(tmp_path / "again").num_nextn_predict_layers == 0
    assert ours.config.num_nextn_predict_layers == layers


@torch.no_grad()
def test_block_fp8_loads_dequantised(tmp_path):
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    make_folder(tmp_path, "deepseek_v3", quantization_config=quantization)
    tensors, dequantised = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        dequantised[name] = weight
        if "proj" not in name or weight.dim() != 2:
            continue
        rows, columns = (-(-size // 16) for size in weight.shape)
        scale = torch.rand(rows, columns) * 0.01 + 0.001
        whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        dequantised[name] = tensors[name].float() * whole
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = HfMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    plain = tmp_path / "plain"
    theirs = make_folder(plain, "deepseek_v3")  # whose own class cannot read 40 rows in blocks of 16
    save_file(dequantised, plain / "model.safetensors", {"format": "pt"})
    theirs = type(theirs).from_pretrained(plain)
    ids = random_ids(2, 9)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    ours.save_pretrained(tmp_path / "again")
    again = HfMoeForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is no hf_moe checkpoint"),
        ({"topk_method": "greedy"}, "topk_method='greedy' of a deepseek_v3 checkpoint has no equal here"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' of a deepseek_v3"),
    ],
)
def test_what_does_not_translate_is_named(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **FAMILIES["deepseek_v3"], **changes}))
    with pytest.raises(ValueError, match=message):
        HfMoeConfig.from_pretrained(tmp_path)


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.kv_b_proj.weight"), r"lacks model\.layers\.1\.self_attn\.kv_b_proj"),
        (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), r"lacks .*e_score_correction_bias"),
        (
            lambda t: t.pop("model.layers.2.mlp.experts.3.up_proj.weight"),
            r"lacks experts, .*layers\.2\.mlp\.experts\.gate_up",
        ),
        (lambda t: t.update({"model.layers.7.x.weight": torch.ones(2)}), r"no place for: model\.layers\.7\.x\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"model\.norm\.weight \(65,\), not \(64,\)"),
    ],
    ids=["missing", "missing_bias", "missing_expert", "extra", "shape"],
)
def test_a_damaged_checkpoint_is_refused_by_name(change, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(RuntimeError, match=message):
        HfMoeForCausalLM.from_pretrained(tmp_path)


def test_another_head_may_be_new(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    classifier = HfMoeForSequenceClassification.from_pretrained(tmp_path)
    assert classifier.model.norm.weight.equal(model.model.norm.weight)
    assert HfMoeModel.from_pretrained(tmp_path).norm.weight.equal(model.model.norm.weight)
