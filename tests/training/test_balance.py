"""The selection bias under Trainer: however a batch is split, the step is the same; the load evens out; it resumes."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import needs_gloo, run_on_ranks
from tiny import random_ids, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_moe import HfMoeForCausalLM
from hf_moe.model.routing_hf_moe import load_balancing_loss
from hf_moe.training import (
    ExpertLoadCallback,
    GlobalLoadCallback,
    MuonAdamW,
    SelectionBiasCallback,
    balance,
    measure_expert_load,
    metrics,
    move_selection_bias,
    use_selection_bias,
)
from hf_moe.training.balance import selection_biases

# Transformers announces its own coming changes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WAYS = {"whole": (1, 8, 1), "micro_batches": (1, 2, 4), "processes": (2, 2, 2)}


def arguments(folder, batch=8, micro_batches=1, steps=2, **changes):
    return TrainingArguments(**{
        "output_dir": str(folder), "per_device_train_batch_size": batch, "gradient_accumulation_steps": micro_batches,
        "max_steps": steps, "learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential", **changes,
    })  # fmt: skip


def samples(count=16):
    return [{"input_ids": row, "labels": row} for row in random_ids(count, 10)]


def biases(model):
    return torch.stack([bias.flatten() for bias in selection_biases(model)]).clone()


def test_the_rule_moves_each_expert_by_the_rate_towards_the_mean():
    bias = torch.zeros(4)
    move_selection_bias(bias, torch.tensor([9, 1, 5, 5]), 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


EACH_GROUP = {"n_routed_experts": 12, "num_experts_per_tok": 6, "n_group": 3, "topk_each_group": True}


@pytest.mark.parametrize("groups", [{}, EACH_GROUP])
def test_a_greedy_router_chooses_the_same_with_a_bias_of_zero_and_saves_it(tmp_path, groups):
    model, ids = tiny_model("gqa", **groups), random_ids(2, 9)
    expected = model(ids).logits
    use_selection_bias(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    for i, bias in enumerate(selection_biases(model)):
        bias[i] += 3.0
    model.save_pretrained(tmp_path)
    loaded = HfMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(biases(loaded), biases(model))
    assert loaded.config.n_group == model.config.n_group == (3 if groups else 1)
    assert (loaded.config.topk_method, selection_biases(loaded)[0].dtype) == ("noaux_tc", torch.float32)


def test_routers_that_would_choose_otherwise_are_refused():
    with pytest.raises(ValueError, match="group_limited_greedy"):
        use_selection_bias(tiny_model("deepseek_v2"))
    with pytest.raises(ValueError, match="has no e_score_correction_bias"):
        selection_biases(tiny_model("gqa"))


def one_step(rank, ways, folder):
    """Two steps without learning rate, so that the bias alone decides; it goes to a file."""
    for way in ways:
        world_size, batch, micro_batches = WAYS[way]
        model = HfMoeForCausalLM.from_pretrained(f"{folder}/model")
        callback = SelectionBiasCallback(rate=0.25)
        options = arguments(f"{folder}/{way}", batch, micro_batches, activation_checkpointing=way == "micro_batches")
        trainer = Trainer(model, options, train_dataset=samples(), callbacks=[callback])
        trainer.train()
        assert trainer.args.world_size == world_size
        if rank == 0:
            torch.save((biases(model), callback.total), f"{folder}/{way}.pt")


@needs_gloo
def test_the_bias_sees_the_whole_batch_however_it_is_split(tmp_path):
    model = tiny_model("deepseek_v3", router_aux_loss_coef=0.0)
    model.save_pretrained(tmp_path / "model")
    expected, counts = biases(model), torch.zeros(2, 8, dtype=torch.int64)
    for step in range(2):
        with measure_expert_load(model) as load, torch.no_grad():
            model(torch.stack([sample["input_ids"] for sample in samples()[8 * step : 8 * step + 8]]))
        counts += load.counts
        for bias, row in zip(selection_biases(model), load.counts, strict=True):
            bias += 0.25 * torch.sign(row.float().mean() - row)
    assert not torch.equal(expected, biases(model))
    one_step(0, ["whole", "micro_batches"], tmp_path)
    run_on_ranks(one_step, 2, ["processes"], tmp_path)
    for way in WAYS:
        found, total = torch.load(tmp_path / f"{way}.pt")
        torch.testing.assert_close(found, biases(model))
        assert total == counts.tolist(), way


def two_steps_of_muon(rank, folder, changes):
    """Two steps of `MuonAdamW`, on ranks that hold half of the experts each where `changes` says so."""
    model = HfMoeForCausalLM.from_pretrained(f"{folder}/model", **changes)
    callback = SelectionBiasCallback(rate=0.25, pictures=False)
    batch = 2 if changes else 8
    Trainer(
        model,
        arguments(f"{folder}/out", batch, 2 if changes else 1, learning_rate=0.01),
        train_dataset=samples(),
        callbacks=[callback],
        optimizer_cls_and_kwargs=(MuonAdamW.for_trainer, {"lr": 0.01}),
    ).train()
    whole = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save((whole, callback.total), f"{folder}/{len(changes)}.pt")


@needs_gloo
def test_expert_parallel_ranks_take_the_same_step(tmp_path):
    model = tiny_model("deepseek_v3", router_aux_loss_coef=0.0)
    model.save_pretrained(tmp_path / "model")
    two_steps_of_muon(0, tmp_path, {})
    run_on_ranks(two_steps_of_muon, 2, tmp_path, {"distributed_config": DistributedConfig(fsdp_size=2, ep_size=2)})
    (expected, total), (found, same) = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert same == total
    for name, before in model.state_dict().items():
        if ".mlp." in name:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-3, msg=name)
            # A bias may have moved there and back.
            assert name.endswith("bias") or (expected[name] - before).abs().max() > 5e-3, name


def three_steps(rank, ways, folder):
    """Three steps with the loss of the whole batch's load; weights and losses go to a file."""
    for way in ways:
        _, batch, micro_batches = WAYS[way]
        model = HfMoeForCausalLM.from_pretrained(f"{folder}/model")
        options = arguments(
            f"{folder}/{way}", batch, micro_batches, steps=3, learning_rate=0.5, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=samples(24), callbacks=[GlobalLoadCallback(pictures=False)])
        trainer.train()
        if rank == 0:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            torch.save((model.state_dict(), losses), f"{folder}/{way}.pt")


@needs_gloo
def test_the_loss_of_the_whole_batchs_load_is_the_same_however_it_is_split(tmp_path):
    model = tiny_model("gqa", router_aux_loss_coef=2.0)
    model.save_pretrained(tmp_path / "model")
    three_steps(0, ["whole", "micro_batches"], tmp_path)
    run_on_ranks(three_steps, 2, ["processes"], tmp_path)
    expected, losses = torch.load(tmp_path / "whole.pt")
    for way in ("micro_batches", "processes"):
        weights, found = torch.load(tmp_path / f"{way}.pt")
        assert found == pytest.approx(losses, rel=1e-4)
        for name, weight in expected.items():
            difference = (weights[name] - weight).abs().max().item()
            assert difference <= 1e-6 + 2e-5 * weight.abs().max().item(), name
    # It reaches the routers: without the loss they move otherwise.
    model.config.router_aux_loss_coef = 0.0
    model.save_pretrained(tmp_path / "model")
    three_steps(0, ["whole"], tmp_path)
    without, _ = torch.load(tmp_path / "whole.pt")
    assert all((without[name] - expected[name]).abs().max() > 1e-3 for name in expected if name.endswith("gate.weight"))


@pytest.mark.parametrize("callback", [GlobalLoadCallback, SelectionBiasCallback])
def test_routers_that_peft_trains_beside_their_originals(callback, tmp_path):
    model = tiny_model("deepseek_v3", router_aux_loss_coef=0.5)
    lora = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
    callback = callback(pictures=False)
    Trainer(get_peft_model(model, lora), arguments(tmp_path), train_dataset=samples(8), callbacks=[callback]).train()
    assert callback.total is not None
    originals, trained = (
        [b for n, b in model.named_buffers() if where in n] for where in ("original_module", "modules_to_save")
    )
    moved = [not torch.equal(*pair) for pair in zip(originals, trained, strict=True)]
    assert moved == [isinstance(callback, SelectionBiasCallback)] * 2


def test_an_adapter_that_does_not_hold_the_bias_is_told_of(monkeypatch, tmp_path):
    warnings: list[str] = []
    monkeypatch.setattr(balance.logger, "warning", warnings.append)
    for saved in (["gate"], []):
        assert not warnings
        lora = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=saved)
        model = get_peft_model(tiny_model("deepseek_v3"), lora)
        callbacks = [SelectionBiasCallback(pictures=False)]
        Trainer(model, arguments(tmp_path, steps=1), train_dataset=samples(8), callbacks=callbacks).train()
    assert "not among the adapter's files" in warnings[0]


def test_the_loss_of_a_batchs_load_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 4, generator=generator).requires_grad_()
    share, mask = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    loss = load_balancing_loss(scores, scores.detach().topk(2).indices, mask, share)
    p = scores.double() / scores.double().sum(-1, keepdim=True)
    expected = 4 * (share.double() * p[mask.bool()].mean(0)).sum()
    torch.testing.assert_close(loss.double(), expected)
    for ours, theirs in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_load_becomes_even_and_is_logged_and_drawn(tmp_path):
    model = use_selection_bias(tiny_model("gqa", router_aux_loss_coef=0.0))
    data = samples(8) * 40
    # The metrics alone keep watch too: two counters do not disturb each other.
    trainer = Trainer(
        model, arguments(tmp_path, steps=40), train_dataset=data, callbacks=[SelectionBiasCallback(rate=0.01)]
    )
    ExpertLoadCallback(per_layer=False, pictures=False).add_to(trainer)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["experts/max_over_mean"] > 1.4 > 1.25 > last["experts/max_over_mean"]
    assert last["experts/layer_01/entropy"] > first["experts/layer_01/entropy"]
    assert last["experts/unused"] == 0.0
    assert {path.name for path in (tmp_path / "experts").iterdir()} == {"load.png", "balance.png"}


def test_without_matplotlib_there_are_no_pictures_and_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(metrics, "can_draw", lambda: False)
    monkeypatch.setattr(metrics.logger, "warning", said.append)
    model = use_selection_bias(tiny_model("gqa", router_aux_loss_coef=0.0))
    Trainer(model, arguments(tmp_path, steps=1), train_dataset=samples(8), callbacks=[ExpertLoadCallback()]).train()
    assert not (tmp_path / "experts").exists()
    assert "matplotlib" in said[0]


def test_a_run_that_was_interrupted_goes_on_to_the_same_bias(tmp_path):
    def run(name, **changes):
        model = tiny_model("deepseek_v3", router_aux_loss_coef=0.0)
        callback = SelectionBiasCallback(rate=0.1, pictures=False)
        options = arguments(
            tmp_path / name, steps=4, save_strategy="steps", save_steps=2, learning_rate=0.01, **changes
        )
        options.restore_callback_states_from_checkpoint = True
        return model, Trainer(model, options, train_dataset=samples(32), callbacks=[callback])

    whole, trainer = run("whole")
    trainer.train()
    state = json.loads(Path(tmp_path, "whole/checkpoint-2/trainer_state.json").read_text())
    assert sum(map(sum, state["stateful_callbacks"]["SelectionBiasCallback"]["attributes"]["total"])) == 2 * 2 * 80 * 2
    model, trainer = run("resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    torch.testing.assert_close(biases(model), biases(whole))
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SelectionBiasCallback))
    assert sum(map(sum, callback.total)) == 4 * 2 * 80 * 2


def test_transformers_own_deepseek_is_balanced_too(tmp_path):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=99, hidden_size=32, intermediate_size=24, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    callback = SelectionBiasCallback(rate=0.25, pictures=False)
    Trainer(model, arguments(tmp_path, steps=1), train_dataset=samples(), callbacks=[callback]).train()
    assert biases(model).abs().max() == 0.25
    assert sum(callback.total[0]) == 8 * 10 * 2
