"""LoRA on experts through peft's calls: the numbers and gradients of peft's own forward, its files, and the presets."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.kernels.experts import NAME
from hf_moe.training.lora import load_lora, lora_config, use_grouped_lora

# peft announces its own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": None}
GROUPED = TINY | {"num_key_value_heads": 1, "num_experts_per_tok": 2}
MODELS = {
    "hf_moe": lambda: HfMoeForCausalLM(
        HfMoeConfig(
            **TINY, intermediate_size=48, moe_intermediate_size=16, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
            first_k_dense_replace=0,
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**GROUPED, num_experts=4, moe_intermediate_size=16, head_dim=16)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**GROUPED, num_experts=4, intermediate_size=16)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4, intermediate_size=16)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**GROUPED, num_local_experts=4, intermediate_size=16, head_dim=16)
    ),
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % 64


def base(name="qwen3_moe", implementation=NAME):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_experts_implementation(implementation)
    return model


def filled(model):
    """B starts at zero, where it hides A."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                parameter.normal_(std=0.2)
    return model


def adapted(name="qwen3_moe", implementation=NAME, **options):
    model = base(name, implementation)
    return filled(get_peft_model(model, lora_config("experts", model=model, **({"r": 4} | options))))


def outcome(model):
    """Logits and the gradients of everything that trains."""
    model.zero_grad()
    logits = model(TOKENS, labels=TOKENS)
    logits.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in key for key in gradients)
    return {"logits": logits.logits.detach()} | gradients


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=2e-6, msg=lambda m, name=name: name + m)


def peft_own(model):
    """The same model, computed by peft: its wrapper sums the weights."""
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize(("name", "rank"), [*((name, 4) for name in MODELS), ("qwen3_moe", 1), ("qwen3_moe", 16)])
def test_as_peft_computes_it(name, rank):
    model = adapted(name, r=rank)
    found = outcome(model)
    assert found["logits"].isfinite().all()
    same(found, outcome(peft_own(model)))


def test_the_sum_of_weights_is_never_formed(monkeypatch):
    from peft.tuners.lora.layer import ParamWrapper

    def fail(*_):
        raise AssertionError("formed")

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", fail)
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", fail)
    outcome(adapted())


# peft looks for a pattern's names among modules only, and warns although it applies the pattern to the parameter.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_rank_and_alpha_patterns_and_rslora():
    model = adapted(rank_pattern={"down_proj": 3}, alpha_pattern={"gate_up_proj": 5}, use_rslora=True)
    assert {p.shape[0] // 4 for n, p in model.named_parameters() if "lora_A" in n} == {3, 4}
    same(outcome(model), outcome(peft_own(model)))


def test_files_go_both_ways_with_peft(tmp_path):
    model = adapted()
    wanted = outcome(model)
    assert any(key.endswith("mlp.experts.base_layer.lora_A.weight") for key in _saved(model, tmp_path))
    # Plain peft reads ours, and its files are as ours.
    plain = PeftModel.from_pretrained(base(implementation="eager"), tmp_path / "ours", is_trainable=True)
    same(outcome(plain), wanted)
    plain.save_pretrained(tmp_path / "plain")
    ours = use_grouped_lora(PeftModel.from_pretrained(base(), tmp_path / "plain", is_trainable=True))
    same(outcome(ours), wanted)


def test_a_file_of_adapters_with_dropout(tmp_path):
    model = adapted(lora_dropout=0.3, r=8).eval()
    model.save_pretrained(tmp_path)
    again = load_lora(base(), tmp_path, is_trainable=True)
    assert {p.requires_grad for n, p in again.named_parameters() if "lora" in n} == {True}
    torch.testing.assert_close(again.eval()(TOKENS).logits, model(TOKENS).logits)


def _saved(model, folder):
    from safetensors import safe_open

    model.save_pretrained(folder / "ours")
    with safe_open(folder / "ours" / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_merge_unmerge_disable_and_unload():
    model = adapted().eval()
    with torch.no_grad():
        wanted = model(TOKENS).logits
        plain = base().eval()(TOKENS).logits
        assert (wanted - plain).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(model(TOKENS).logits, plain)
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_several_adapters_one_at_a_time_and_together():
    model = adapted()
    model.add_adapter("second", lora_config("experts", model=base(), r=2))
    filled(model)
    outcomes = {}
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        found = outcome(model)
        outcomes[str(active)] = found["logits"]
        same(found, outcome(peft_own(model)))
        model.set_experts_implementation(NAME)
    assert len({round(float(logits.sum()), 4) for logits in outcomes.values()}) == 3


def test_dropout_acts_in_training_only_and_needs_the_grouped_path():
    model = adapted(lora_dropout=0.5)
    torch.manual_seed(2)
    first, second = model(TOKENS).logits, model(TOKENS).logits
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(model(TOKENS).logits, adapted().eval()(TOKENS).logits)
    model.train().set_experts_implementation("eager")
    with pytest.raises(ValueError, match="lora_dropout"):
        model(TOKENS)


def test_gradient_checkpointing_changes_nothing():
    model = adapted()
    wanted = outcome(model)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(outcome(model), wanted)


def test_adapters_in_float32_on_a_bfloat16_base_and_autocast():
    model = base().bfloat16()
    model = filled(get_peft_model(model, lora_config("experts", model=model, r=4)))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    found, truth = outcome(model), outcome(adapted())
    assert all(g.dtype == torch.float32 for name, g in found.items() if "lora" in name)
    assert (found["logits"].float() - truth["logits"]).norm() < 0.05 * truth["logits"].norm()
    whole = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(whole)
    assert (found["logits"].float() - truth["logits"]).norm() < 0.05 * truth["logits"].norm()


def test_one_graph():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.experts
    x, index, weight = torch.randn(8, 32), torch.randint(4, (8, 2)), torch.rand(8, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, weight), layer(x, index, weight))


def test_experts_that_are_split_over_processes_are_refused():
    def split(model):
        for layer in model.model.layers:
            layer.mlp.experts._is_expert_parallel, layer.mlp.experts.num_experts = True, 2
        return model

    model = split(base())
    with pytest.raises(ValueError, match="expert parallelism, and a process has 2 of the experts"):
        get_peft_model(model, lora_config("experts", model=model))
    plain = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="expert parallelism"):
        use_grouped_lora(get_peft_model(split(base()), plain))


def test_presets():
    model = base("hf_moe")
    found = lora_config("all", model=model, r=2)
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} == set(found.target_parameters)
    assert any("shared_experts" in name for name in found.target_modules)
    names = [n for n, p in get_peft_model(model, found).named_parameters() if p.requires_grad]
    assert any("self_attn" in n for n in names)
    assert any("shared_experts" in n for n in names)
    assert not any(".gate." in n or "lm_head" in n or "embed" in n for n in names)
    attention = lora_config("attention", model=base("hf_moe"))
    assert attention.target_parameters is None
    assert all("self_attn" in name for name in attention.target_modules)


def test_names_that_match_nothing():
    with pytest.raises(ValueError, match=r"'router'.*attention, experts, all"):
        lora_config("router", model=base())
    with pytest.raises(ValueError, match=r"'experts' matches nothing.*fused experts.*found 0"):
        lora_config("experts", model=torch.nn.Linear(2, 2))
    dense = base()
    with pytest.raises(ValueError, match="no LoRA on experts"):
        use_grouped_lora(get_peft_model(dense, LoraConfig(target_modules=["q_proj"])))
