"""Several dense models into one mixture."""

import json

import pytest
import torch
from dense import save_dense
from safetensors.torch import load_file, save_file

from hf_moe.upcycling import upcycle, verify

CHOICES = {"mode": "branch", "experts": 4, "top_k": 2, "progress": False}


def test_experts_come_from_their_source_and_the_rest_is_the_mean(tmp_path):
    folders = [save_dense(tmp_path / f"dense{seed}", "llama_biases", tokenizer=True, seed=seed) for seed in (0, 1)]
    target = upcycle(folders, tmp_path / "moe", **CHOICES)
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    moe = load_file(next(target.glob("*.safetensors")))
    up = "model.layers.1.mlp.up_proj.weight"
    for expert in range(4):
        assert torch.equal(moe[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"], (first, second)[expert % 2][up])
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight", "model.norm.weight"):
        assert (moe[name] - (first[name] + second[name]) / 2).abs().max() <= 1e-7
    v = "model.layers.0.self_attn.v_proj.weight"
    latent = moe["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][: first[v].shape[0]]
    assert (latent - (first[v] + second[v]) / 2).abs().max() <= 1e-7

    certificate = verify(folders, target, tokens=100, new_tokens=4, progress=False)
    assert certificate["passed"]
    assert certificate["source"] == "dense0 + dense1"
    sources = [part["source"] for t in certificate["tensors"] for part in t["sources"]]
    assert set(sources) == {0, 1}


def test_equal_branches_are_exact(tmp_path):
    folder = save_dense(tmp_path / "dense", "gemma3")
    target = upcycle([folder, folder], tmp_path / "moe", **CHOICES)
    certificate = verify([folder, folder], target, tokens=100, new_tokens=4, progress=False)
    assert certificate["logits"]["max_abs_difference"] <= 1e-5


def test_licences(tmp_path):
    folders = [save_dense(tmp_path / f"dense{seed}", seed=seed) for seed in (0, 1)]
    for folder, name in zip(folders, ("mit", "apache-2.0"), strict=True):
        (folder / "README.md").write_text(f"---\nlicense: {name}\n---\n")
    card = (upcycle(folders, tmp_path / "moe", **CHOICES) / "README.md").read_text()
    assert "**The sources disagree**: dense0 states `mit`, dense1 states `apache-2.0`" in card
    assert "license: other" in card
    assert "--branch dense1" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "has vocab_size=300, dense has 258"),
        ({"intermediate_size": 96}, "has intermediate_size=96, dense has 64"),
        ({"name": "qwen3"}, "has model_type='qwen3', dense has 'llama'"),
        ({"name": "llama2"}, "branches must agree"),
    ],
)
def test_sources_that_do_not_match(tmp_path, changes, message):
    first, other = save_dense(tmp_path / "dense"), save_dense(tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=message):
        upcycle([first, other], tmp_path / "moe", **CHOICES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "other"]


def test_damage_in_a_further_source_leaves_nothing(tmp_path):
    folders = [save_dense(tmp_path / f"dense{seed}", seed=seed) for seed in (0, 1)]
    tensors, name = load_file(folders[1] / "model.safetensors"), "model.layers.2.mlp.down_proj.weight"
    tensors[name][5, 5] = torch.inf
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        upcycle(folders, tmp_path / "moe", **CHOICES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense0", "dense1"]


def test_other_vocabulary_number_of_experts_and_mode(tmp_path):
    first, other = (save_dense(tmp_path / name, tokenizer=True) for name in ("dense", "other"))
    with pytest.raises(ValueError, match="experts=3 is not a multiple of the 2 sources"):
        upcycle([first, other], tmp_path / "moe", **{**CHOICES, "experts": 3})
    with pytest.raises(ValueError, match="mode='copy' with 2 sources"):
        upcycle([first, other], tmp_path / "moe", **{**CHOICES, "mode": "copy"})
    with pytest.raises(ValueError, match="mode='branch' with 1 sources"):
        upcycle(first, tmp_path / "moe", **CHOICES)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="have other vocabularies"):
        upcycle([first, other], tmp_path / "moe", **CHOICES)
