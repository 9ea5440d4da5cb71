"""The router's losses under Trainer: one process with one batch, with micro-batches, and two gloo processes."""

import pytest
import torch
from processes import needs_gloo, run_on_ranks
from tiny import random_ids, tiny_model
from transformers import Trainer, TrainingArguments

from hf_moe import HfMoeForCausalLM

pytestmark = needs_gloo

SAMPLES, LEARNING_RATE = 8, 0.5
# Processes, sequences a micro-batch, micro-batches a step: all of them take the same eight sequences in each step.
WAYS = {"whole": (1, 8, 1), "micro_batches": (1, 1, 8), "processes": (2, 4, 1), "both": (2, 2, 2)}
LOSSES = {
    "means": {"router_aux_loss_coef": 0.0, "router_seq_aux_loss_coef": 2.0, "router_z_loss_coef": 0.5},
    "load": {"router_aux_loss_coef": 2.0},
}


def samples(uneven: bool) -> list[dict[str, torch.Tensor]]:
    """Sequences, each with its labels; `uneven` takes one target more from each than from the one before it."""
    ids = random_ids(SAMPLES, 10)
    labels = ids.clone()
    for i in range(SAMPLES if uneven else 0):
        labels[i, : i + 1] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def train(rank, ways, folder, name):
    """One optimizer step from the same weights in each way; weights and reported loss go to files."""
    for way in ways:
        world_size, batch, micro_batches = WAYS[way]
        arguments = TrainingArguments(
            output_dir=f"{folder}/out",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=micro_batches,
            max_steps=1,
            optim="sgd",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            HfMoeForCausalLM.from_pretrained(f"{folder}/{name}"), arguments, train_dataset=samples(name == "load")
        )
        trainer.train()
        assert trainer.args.world_size == world_size
        if rank == 0:
            weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
            torch.save((weights, trainer.state.log_history[0]["loss"]), f"{folder}/{name}_{way}.pt")


def trained(ways, folder, name):
    """Weights and reported loss after a step in each way; all ways have the same number of processes."""
    run_on_ranks(train, WAYS[ways[0]][0], ways, folder, name)
    return [torch.load(f"{folder}/{name}_{way}.pt") for way in ways]


def assert_same_step(weights, expected, before):
    for name, weight in expected.items():
        difference = (weights[name] - weight).abs().max().item()
        assert difference <= 1e-6 + 1e-5 * weight.abs().max().item(), name
    routers = [name for name in before if name.endswith("gate.weight")]
    assert all((expected[name] - before[name]).abs().max() > 1e-2 for name in routers)


def test_means_over_sequences_and_tokens_are_the_same_however_a_batch_is_split(tmp_path):
    model = tiny_model("gqa", **LOSSES["means"])
    model.save_pretrained(tmp_path / "means")
    (expected, loss), alone = trained(("whole", "micro_batches"), tmp_path, "means")
    for weights, reported in (alone, *trained(("processes", "both"), tmp_path, "means")):
        assert_same_step(weights, expected, model.state_dict())
        assert reported == pytest.approx(loss, rel=1e-4)


def test_load_loss_of_two_processes_is_the_mean_weighted_by_their_targets(tmp_path):
    model = tiny_model("gqa", **LOSSES["load"]).train()
    model.save_pretrained(tmp_path / "load")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ((weights, reported),) = trained(("both",), tmp_path, "load")

    # Trainer's order of the sequences: its sampler's permutation, two in turn to each process.
    generator = torch.Generator().manual_seed(42)
    everything = samples(uneven=True)
    total = sum((sample["labels"][1:] != -100).sum() for sample in everything)
    loss = torch.zeros(())
    order = torch.randperm(SAMPLES, generator=generator).tolist()
    for i in range(0, SAMPLES, 2):
        batch = {
            key: torch.stack([everything[index][key] for index in order[i : i + 2]]) for key in ("input_ids", "labels")
        }
        share = (batch["labels"][:, 1:] != -100).sum() / total
        loss = loss + share * model(**batch).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
    assert_same_step(weights, model.state_dict(), before)
    assert reported == pytest.approx(loss.item(), rel=1e-4)
