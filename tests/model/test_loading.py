"""Saved, loaded, placed and pushed as Transformers does it; `Trainer` keeps and brings back its best checkpoint."""

from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi
from tiny import random_ids, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe import HfMoeForCausalLM, HfMoeModel


@torch.no_grad()
@pytest.mark.parametrize("options", [{"max_shard_size": "100KB"}, {"save_original_format": False}])
def test_shards_and_fused_experts_are_the_same_weights(options, variant, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(weight.equal(loaded.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        ({}, "bfloat16"),
        ({"dtype": "auto"}, "bfloat16"),
        ({"dtype": torch.float16}, "float16"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_dtypes(asked, dtype, tmp_path):
    """The file's, or what is asked for; the selection bias stays in float32."""
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for auto, kind in ((AutoModelForCausalLM, HfMoeForCausalLM), (AutoModel, HfMoeModel)):
        loaded = auto.from_pretrained(tmp_path, **asked)
        assert type(loaded) is kind
        found = {name: value.dtype for name, value in loaded.state_dict().items()}
        assert {found.pop(name) for name in list(found) if name.endswith("e_score_correction_bias")} == {torch.float32}
        assert set(found.values()) == {getattr(torch, dtype)}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*offload:UserWarning")
def test_layers_on_disk(variant, tmp_path):
    model, ids = tiny_model(variant), random_ids(2, 9)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    size = sum(parameter.nbytes for parameter in model.parameters())
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size * 2 // 3}, offload_folder=str(tmp_path / "disk")
    )
    assert "disk" in placed.hf_device_map.values()
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert placed.generate(ids, **greedy).equal(model.generate(ids, **greedy))


def test_push_sends_weights_and_code(monkeypatch):
    sent = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: mock.Mock(repo_id="me/model"))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, *_, operations, **__: sent.extend(operations))
    tiny_model().push_to_hub("me/model")
    names = {operation.path_in_repo for operation in sent}
    assert {"config.json", "model.safetensors", "modeling_hf_moe.py", "configuration_hf_moe.py"} <= names


@pytest.mark.parametrize("name", ["deepseek_v3", "sandwich"])
def test_trainer_brings_back_its_best_checkpoint(name, tmp_path):
    samples = [{"input_ids": row, "labels": row} for row in random_ids(8, 10)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=4, learning_rate=3e-3,
        eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(tiny_model(name), arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    # The greatest loss is the first one's, so that what is loaded is not what training ended with.
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) == losses[0]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0])
    best = HfMoeForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(weight.equal(best.state_dict()[name]) for name, weight in trainer.model.state_dict().items())


def test_separate_experts_are_assigned_to_a_model_without_memory():
    model = tiny_model()
    saved, down = {}, {}
    for name, weight in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, rows in enumerate(weight):
                saved[f"{prefix}.{expert}.gate_proj.weight"], saved[f"{prefix}.{expert}.up_proj.weight"] = rows.chunk(2)
        elif last == "down_proj" and weight.dim() == 3:
            down |= {f"{prefix}.{expert}.down_proj.weight": rows for expert, rows in enumerate(weight)}
        else:
            saved[name] = weight
    with torch.device("meta"):
        empty = HfMoeForCausalLM(model.config)
    empty.load_state_dict(saved | down, assign=True)
    assert all(weight.equal(model.state_dict()[name]) for name, weight in empty.state_dict().items())
    with torch.device("meta"):
        empty = HfMoeForCausalLM(model.config)
    down.pop(next(iter(down)))
    with pytest.raises(RuntimeError, match=r"Missing.*experts\.down_proj"):
        empty.load_state_dict(saved | down, assign=True)
