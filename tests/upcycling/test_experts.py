"""The rules that change an MLP: what stays, what is drawn anew, and that the loss they cost is measured."""

import json

import pytest
import torch
from dense import save_dense
from safetensors.torch import load_file

from hf_moe.upcycling import upcycle, verify
from hf_moe.upcycling.experts import columns, noise, redraw

QUICK = {"tokens": 100, "new_tokens": 4, "progress": False}


def weight_of(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.1


@pytest.mark.parametrize("dim", [0, 1])
def test_redraw_changes_the_share_and_keeps_the_distribution(dim):
    weight = weight_of(0, 400, 500)
    new = redraw(weight, dim=dim, ratio=0.25, neurons="a", values="b")
    changed = (new != weight).any(dim=1 - dim)
    assert changed.sum() == round(0.25 * weight.shape[dim])
    drawn = new.movedim(dim, 0)[changed]
    assert drawn.mean() == pytest.approx(0.1, abs=0.01)
    assert drawn.std() == pytest.approx(0.3, abs=0.01)


def test_redraw_takes_the_same_neurons_of_all_three_matrices():
    gate, down = weight_of(0, 64, 48), weight_of(1, 48, 64)
    rows = (redraw(gate, dim=0, ratio=0.5, neurons="expert 3", values="gate") != gate).any(dim=1)
    across = (redraw(down, dim=1, ratio=0.5, neurons="expert 3", values="down") != down).any(dim=0)
    assert torch.equal(rows, across)
    other = (redraw(gate, dim=0, ratio=0.5, neurons="expert 4", values="gate") != gate).any(dim=1)
    assert not torch.equal(rows, other)


def test_nothing_to_redraw_and_everything():
    weight = weight_of(0, 8, 6)
    assert redraw(weight, dim=0, ratio=0.0, neurons="a", values="b") is weight
    assert (redraw(weight, dim=0, ratio=1.0, neurons="a", values="b") != weight).all()


def test_noise_has_the_asked_strength():
    weight = weight_of(0, 300, 400)
    assert (noise(weight, std=0.1, values="a") - weight).std() == pytest.approx(0.03, rel=0.02)
    assert torch.equal(noise(weight, std=0.0, values="a"), weight)


def test_columns():
    weight = weight_of(0, 4, 6)
    assert torch.equal(columns(weight, start=2, stop=5, scale=1.0), weight[:, 2:5])
    assert torch.equal(columns(weight, start=2, stop=5, scale=3.0), weight[:, 2:5].double() * 3)


@pytest.mark.parametrize("choices", [{"mode": "drop", "drop_ratio": 0.5}, {"mode": "noise", "noise_std": 0.3}])
def test_inexact_modes_are_measured(tmp_path, choices):
    source = save_dense(tmp_path / "dense", tokenizer=True)
    target = upcycle(source, tmp_path / "moe", experts=3, progress=False, **choices)
    tensors = load_file(next(target.glob("*.safetensors")))
    first, second = (tensors[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in (0, 1))
    assert not torch.equal(first, second)
    certificate = verify(source, target, **QUICK)
    assert certificate["passed"]
    assert certificate["logits"]["max_abs_difference"] > 1e-3
    assert abs(certificate["loss"]["difference"]) > 1e-6
    card = (target / "README.md").read_text()
    assert f"({certificate['loss']['difference']:+.4f})" in card
    # A second measurement replaces the first.
    verify(source, target, **QUICK)
    assert (target / "README.md").read_text() == card
    assert json.loads((target / "certificate.json").read_text()) == certificate


def test_drop_of_nothing_is_a_copy(tmp_path):
    source = save_dense(tmp_path / "dense")
    weights = []
    for name, choices in (("drop", {"mode": "drop", "drop_ratio": 0.0}), ("copy", {"mode": "copy"})):
        target = upcycle(source, tmp_path / name, experts=3, progress=False, **choices)
        weights.append(next(target.glob("*.safetensors")).read_bytes())
    assert weights[0] == weights[1]
