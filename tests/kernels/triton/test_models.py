"""Models of Transformers with our experts against the same models with Transformers' own."""

import pytest
import torch
from cases import DEVICE, HALF, assert_as_good
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe.kernels import any_gate, layer
from hf_moe.kernels.experts import NAME, accelerate, gating_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=5)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=6, moe_intermediate_size=24, head_dim=16)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=4)),
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**(SMALL | LATENT), n_routed_experts=4, moe_intermediate_size=24)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, head_dim=16)),
    "nemotron-h": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"},
            layers_block_type=["attention", "moe"],
            n_routed_experts=4,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
            n_group=1,
            topk_group=1,
            head_dim=16,
        )
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(18, device=DEVICE).view(2, 9) * 7 % 64
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_gradients(name, monkeypatch):
    model = build(name)
    model.set_experts_implementation("grouped_mm")
    theirs = step(model)
    calls = []
    for where, function in ((layer, "experts"), (any_gate, "experts_with_gate")):
        original = getattr(where, function)
        monkeypatch.setattr(where, function, lambda *a, f=original, n=function, **k: calls.append(n) or f(*a, **k))
    assert accelerate(model) is model
    ours = step(model)
    assert set(calls) == {"experts"}
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
def test_compiled_experts_take_the_fused_path(name, monkeypatch):
    module = next(m for m in accelerate(build(name)).modules() if hasattr(m, "is_transposed"))
    x_TD = torch.randn(9, 32, device=DEVICE)
    scores = torch.rand(9, module.num_experts, device=DEVICE).topk(2)
    eager = module(x_TD, scores.indices, scores.values)
    monkeypatch.setattr(any_gate, "experts_with_gate", None)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x_TD, scores.indices, scores.values), eager)


def test_loading_by_name(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation=NAME).to(DEVICE)
    assert loaded.config._experts_implementation == NAME
    torch.testing.assert_close(step(loaded)["logits"], step(model)["logits"], rtol=1e-4, atol=1e-5)


def test_a_gate_that_the_kernels_do_not_know_runs_unfused():
    model = build("qwen3-moe")
    experts = [m for m in model.modules() if hasattr(m, "is_transposed")]
    for module in experts:
        module.act_fn = nn.Mish()
        assert gating_of(module) is None
    model.set_experts_implementation("grouped_mm")
    theirs = step(model)
    ours = step(accelerate(model))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=2e-5)
    x_TD, top = torch.randn(9, 32, device=DEVICE), torch.rand(9, 6, device=DEVICE).topk(2)
    compiled = torch.compile(experts[0], fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x_TD, top.indices, top.values), experts[0](x_TD, top.indices, top.values))


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_and_recompute(recompute):
    model = build("olmoe")
    model.set_experts_implementation("eager")
    truth = step(model.double())
    model.float()
    with torch.autocast(DEVICE, dtype=HALF):
        plain = step(model)
        found = step(accelerate(model, recompute=recompute))
    for key in truth:
        assert_as_good(found[key], plain[key], truth[key], key)


def test_a_dense_model_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SMALL.items() if k != "num_experts_per_tok"}))
    with pytest.raises(ValueError, match="has 0 expert modules"):
        accelerate(model)
