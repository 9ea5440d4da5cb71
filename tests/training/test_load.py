"""Expert load against a count by hand; checkpointing, peft, compilation and Transformers' own mixtures."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_ids, tiny_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_moe.training import ExpertLoad, RoutingCounter, measure_expert_load

# peft and Transformers announce their own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def by_hand(model, ids):
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    return torch.stack([torch.bincount(layer.topk(2).indices.flatten(), minlength=layer.shape[1]) for layer in logits])


def test_load_counts_every_choice_of_every_sparse_layer():
    model, ids = tiny_model("gqa"), random_ids(2, 9)
    with measure_expert_load(model) as load, torch.no_grad():
        model(ids)
    model(ids)
    expected = by_hand(model, ids)
    assert torch.equal(load.counts, expected)
    assert load.counts.sum() == 2 * 18 * 2
    assert load.max_over_mean == pytest.approx(expected.max().item() / (36 / 5))
    assert load.unused == pytest.approx((expected == 0).float().mean().item())


def test_load_of_transformers_own_mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    model, ids = MixtralForCausalLM(config).eval(), random_ids(2, 9)
    with measure_expert_load(model) as load, torch.no_grad():
        model(ids)
    assert torch.equal(load.counts, by_hand(model, ids))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_that_checkpointing_runs_twice_counts_once(use_reentrant):
    model, ids = tiny_model("gqa", router_aux_loss_coef=0.0).train(), random_ids(2, 9)
    expected = by_hand(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    counter = RoutingCounter(model, training_only=True)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    model.eval()
    model(ids)
    counter.remove()
    assert torch.equal(counter.load.counts, 2 * expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_adapted_model_counts_too():
    model, ids = tiny_model("gqa"), random_ids(2, 9)
    expected = by_hand(model, ids)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with measure_expert_load(model) as load, torch.no_grad():
        model(ids)
    assert torch.equal(load.counts, expected)


def test_code_compiled_before_is_noticed():
    model, ids = tiny_model("gqa"), random_ids(2, 9)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(ids)
        with pytest.raises(ValueError, match="1 passes were not counted"), measure_expert_load(model):
            model(ids)
        with torch.compiler.set_stance("force_eager"), measure_expert_load(model) as load:
            model(ids)
    torch.compiler.reset()
    assert torch.equal(load.counts, by_hand(tiny_model("gqa"), ids))


def test_figures_of_a_table():
    load = ExpertLoad(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]]))
    assert load.layer_max_over_mean.tolist() == [1.0, 4.0, 2.0]
    assert load.layer_unused.tolist() == [0.0, 0.75, 0.5]
    assert load.layer_entropy.tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert load.max_over_mean == 4.0


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="Linear has no experts"), measure_expert_load(torch.nn.Linear(2, 2)):
        pass
