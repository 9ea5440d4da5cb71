"""What `accelerate` takes over and what it leaves alone, and how both are undone; without a GPU."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

import hf_moe
from hf_moe.kernels.stand_ins import StandInNorm, causal_lm_loss, rounding_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FORMULAS = {
    "Llama's": (OlmoeRMSNorm, True),
    "product before rounding": (GptOssRMSNorm, False),
    "the same, another copy": (Olmo2RMSNorm, False),
    "1 + weight": (Gemma2RMSNorm, None),
    "1 + weight, another copy": (Qwen3NextRMSNorm, None),
    "a gate": (Qwen3NextRMSNormGated, None),
    "not of Transformers": (nn.RMSNorm, None),
    "by another name": (T5LayerNorm, None),
}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "RMSNorm" in type(module).__name__]


@pytest.mark.parametrize(("kind", "rounds"), FORMULAS.values(), ids=FORMULAS)
def test_a_norm_is_known_by_its_numbers(kind, rounds):
    norm = kind(24, eps=1e-5)
    nn.init.normal_(norm.weight)
    assert rounding_of(norm) is rounds


def test_whatever_is_not_bare_stays_as_it_is():
    hooked, wrapped, frozen = (OlmoeRMSNorm(24) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    wrapped.forward = lambda x: x
    frozen.requires_grad_(False)
    assert [rounding_of(norm) for norm in (hooked, wrapped, frozen)] == [None, None, True]


def test_accelerate_and_restore():
    model = mixtral()
    model.set_experts_implementation("eager")
    ids = torch.arange(12).view(2, 6)
    before, kinds = model(ids, labels=ids), [type(norm) for norm in norms(model)]
    for _ in range(2):
        hf_moe.accelerate(model)
        assert len(kinds) == 5
        assert all(isinstance(norm, StandInNorm) and type(norm).__bases__[1] in kinds for norm in norms(model))
        assert model.loss_function is causal_lm_loss
        assert model.config._experts_implementation == "hf_moe_triton"
    after = model(ids, labels=ids)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.loss, before.loss)
    assert hf_moe.restore(model) is model
    assert [type(norm) for norm in norms(model)] == kinds
    assert model.loss_function is ForCausalLMLoss
    assert model.config._experts_implementation == "eager"
    assert not [name for module in model.modules() for name in vars(module) if "hf_moe" in name]
    assert torch.equal(model(ids, labels=ids).loss, before.loss)


def test_a_loss_set_by_hand_stays():
    model = mixtral()
    model.loss_function = by_hand = lambda **_: None
    assert hf_moe.accelerate(model).loss_function is by_hand
    assert hf_moe.restore(model).loss_function is by_hand


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_accelerated_models_are_copied_as_such(duplicate):
    model = hf_moe.accelerate(mixtral())
    found = duplicate(model)
    assert [type(norm) for norm in norms(found)] == [type(norm) for norm in norms(model)]
    assert found.loss_function is causal_lm_loss
    norm = norms(found)[0]
    nn.init.constant_(norm.weight, 2.0)
    x = torch.randn(3, 32)
    torch.testing.assert_close(norm(x), 2 * norms(model)[0](x))
    replica = norm._replicate_for_data_parallel()
    replica.weight = torch.full((32,), 4.0)
    torch.testing.assert_close(replica(x), 2 * norm(x))


def test_the_saved_model_is_the_same(tmp_path):
    model = mixtral()
    ids = torch.arange(12).view(2, 6)
    wanted = model(ids).logits
    hf_moe.accelerate(model).save_pretrained(tmp_path)
    torch.testing.assert_close(MixtralForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)
    assert "hf_moe" not in (tmp_path / "config.json").read_text()


def test_an_accelerated_model_compiles_in_one_graph():
    model = hf_moe.accelerate(mixtral())
    ids = torch.arange(12).view(2, 6)
    wanted = model(ids, labels=ids).loss
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(ids, labels=ids).loss, wanted)


@pytest.mark.parametrize(
    "model",
    [lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=16))],
    ids=["llama", "gemma"],
)
def test_a_model_without_experts_is_refused_and_untouched(model):
    model = model()
    with pytest.raises(ValueError, match="0 expert modules in 2 Transformers models"):
        hf_moe.accelerate(model)
    assert not any(isinstance(norm, StandInNorm) for norm in norms(model))


def test_our_models_loss_is_one_that_trainer_knows_to_shift_its_labels(monkeypatch):
    from tiny import tiny_model
    from transformers import Trainer, TrainingArguments

    from hf_moe.model.fused_hf_moe import FUSED

    model, labels = tiny_model(), torch.arange(6).view(1, 6)
    plain = model(labels, labels=labels).loss
    assert Trainer(model, TrainingArguments(report_to="none", use_cpu=True))._loss_shifts_labels
    monkeypatch.setitem(FUSED, "causal_lm_loss", lambda **_: plain + 1)
    assert model(labels, labels=labels).loss == plain + 1
