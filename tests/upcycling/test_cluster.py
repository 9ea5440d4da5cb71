"""Mode cluster and the routers that learn from text: exact counts, what they learn, their measure, their resumption."""

import json
from pathlib import Path

import pytest
import torch
from dense import byte_tokenizer, dense_model, random_ids, save_dense
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe.upcycling import upcycle, verify
from hf_moe.upcycling.calibration import _ids, run_by_layers
from hf_moe.upcycling.clustering import activity_router, balanced_kmeans, centroid_router, fill_places, group_neurons
from hf_moe.upcycling.sources import open_source

QUICK = {"tokens": 100, "new_tokens": 4, "progress": False}
TEXT = {"calibration_tokens": 256, "progress": False}


def weights(folder):
    return load_file(next(folder.glob("model-*.safetensors")))


def test_groups_that_are_there_are_found():
    """Neurons that fire together stand together, whatever their order, and each group has its exact size."""
    torch.manual_seed(0)
    tokens, experts, width = 400, 4, 6
    label = torch.randperm(experts * width) % experts
    topic = torch.randint(experts, (tokens,))
    contribution = torch.rand(tokens, experts * width) * 0.1 + (topic[:, None] == label).float()
    order = group_neurons(contribution, experts, 0, "seed")
    assert order.sort().values.equal(torch.arange(experts * width))
    assert all(len(set(part.tolist())) == 1 for part in label[order].split(width))
    # x that says the topic: the router's best expert is the topic's.
    x = torch.nn.functional.one_hot(topic, 8).float() + 0.01 * torch.randn(tokens, 8)
    best = (x @ activity_router(x, contribution, order, experts).T).argmax(1)
    assert torch.equal(label[order].view(experts, width)[best, 0], topic)
    # What always fires is shared.
    contribution[:, :3] = 5.0
    assert set(group_neurons(contribution[:, :21], 6, 1, "seed")[:3].tolist()) == {0, 1, 2}


def test_places_are_filled_exactly():
    torch.manual_seed(0)
    for groups in (1, 2, 5):
        for score in (torch.randn(40, groups), torch.zeros(40, groups)):
            assert fill_places(score).bincount(minlength=groups).tolist() == [40 // groups] * groups
    assert fill_places(torch.eye(4)).tolist() == [0, 1, 2, 3]
    assert balanced_kmeans(torch.zeros(8, 3), 4, "seed").bincount().tolist() == [2] * 4


def test_router_rows_are_the_centres_of_clusters():
    torch.manual_seed(0)
    label = torch.arange(90) % 3
    x = torch.eye(5)[label] * 3 + 0.1 * torch.randn(90, 5)
    best = (x @ centroid_router(x, 3, "seed").T).argmax(1)
    assert len({(int(a), int(b)) for a, b in zip(label, best, strict=True)}) == 3


def test_chosen_text_without_a_tokenizer_is_refused(tmp_path):
    source = save_dense(tmp_path / "dense")
    (tmp_path / "text").write_text("words")
    choices = {"mode": "cluster", "experts": 4, "progress": False, "calibration_tokens": 64}
    with pytest.raises(ValueError, match="dense has no tokenizer, so the calibration text cannot be read"):
        upcycle(source, tmp_path / "moe", calibration=(str(tmp_path / "text"),), **choices)
    assert not (tmp_path / ".moe.partial").exists()


def test_text_is_read_by_any_tokenizer_of_the_folder(tmp_path):
    """One without tokenizer.json: a vocabulary and merges."""
    source = save_dense(tmp_path / "dense", tokenizer=True)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    letters = byte_tokenizer().get_vocab()
    (source / "vocab.json").write_text(json.dumps(letters))
    (source / "merges.txt").write_text("#version: 0.2\n")
    ids = _ids(open_source(source), "two words" * 9, 8, 2, True)
    assert ids.flatten().tolist() == [letters[letter] for letter in ("twoĠwords" * 9)[:16]]


@pytest.mark.parametrize("name", ["llama_biases", "gemma2", "phi3", "olmo2", "qwen3", "granite"])
@torch.no_grad()
def test_layer_by_layer_is_the_model(tmp_path, name):
    seen, model, ids = {}, dense_model(name), random_ids()
    run_by_layers(
        open_source(save_dense(tmp_path / "dense", name)), ids, lambda i, x, c: seen.update({i: (x, c)}), lambda n: None
    )
    expected = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, arguments, i=i: expected.update({i: arguments[0].flatten(0, 1)}))
    model(ids)
    assert seen.keys() == expected.keys()
    for i, (x, contribution) in seen.items():
        assert (x - expected[i]).abs().max() <= 1e-5
        assert contribution.shape == (x.shape[0], model.config.intermediate_size)


@pytest.mark.parametrize("name", ["llama3", "phi3", "granite"])
@torch.no_grad()
def test_neurons_are_moved_not_changed(tmp_path, name):
    source = save_dense(tmp_path / "dense", name, tokenizer=True)
    choices = {"mode": "cluster", "experts": 7, "shared_shards": 1, "top_k": 3, "dense_layers": (2,)}
    target = upcycle(source, tmp_path / "moe", **choices, **TEXT)
    dense, moe = load_file(source / "model.safetensors"), weights(target)
    neurons = load_file(target / "calibration.safetensors")["layers.1.neurons"]
    parts = ["shared_experts", *(f"experts.{e}" for e in range(7))]
    down = torch.cat([moe[f"model.layers.1.mlp.{part}.down_proj.weight"] for part in parts], dim=1)
    scale = 0.22 if name == "granite" else 1.0
    expected = dense["model.layers.1.mlp.down_proj.weight"][:, neurons]
    shared = len(neurons) // 8
    assert (down[:, :shared] - expected[:, :shared] * scale).abs().max() <= 1e-7
    assert torch.equal(down[:, shared:], expected[:, shared:])
    assert neurons.sort().values.equal(torch.arange(len(neurons)))
    certificate = verify(source, target, **QUICK)
    assert certificate["passed"]
    assert certificate["loss"]["difference"] != 0
    assert f"({certificate['loss']['difference']:+.4f})" in (target / "README.md").read_text()


@torch.no_grad()
def test_all_experts_chosen_is_nearly_the_dense_model(tmp_path):
    source = save_dense(tmp_path / "dense", tokenizer=True)
    target = upcycle(source, tmp_path / "moe", mode="cluster", experts=4, top_k=4, **TEXT)
    dense, moe = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, target))
    assert sum(p.numel() for p in moe.model.layers[0].mlp.experts.parameters()) == 3 * 48 * 64
    ids = random_ids()
    # The router's weights differ by some hundredths, and nothing else does.
    assert (moe(ids).logits - dense(ids).logits).abs().mean() <= 0.05 * dense(ids).logits.std()
    for layer in moe.model.layers:
        layer.mlp.gate.weight.zero_()
    assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-5


def test_calibrated_routers_of_exact_modes(tmp_path):
    source = save_dense(tmp_path / "dense", tokenizer=True)
    split = {"mode": "split", "shards": 2, "experts": 6, "top_k": 2}
    for name, choices in {"copy": {"experts": 3}, "split": split}.items():
        target = upcycle(source, tmp_path / name, router="centroids", **choices, **TEXT)
        assert verify(source, target, **QUICK)["logits"]["max_abs_difference"] <= 1e-5
        gate = weights(target)["model.layers.0.mlp.gate.weight"]
        assert len(gate.unique(dim=0)) == 3


def test_router_from_prompts_sends_each_text_to_its_source(tmp_path):
    folders = [save_dense(tmp_path / f"dense{seed}", tokenizer=True, seed=seed) for seed in (0, 1)]
    files = []
    for name, words in (("letters", "aaaa bbbb "), ("digits", "0123 4567 ")):
        files.append(str(tmp_path / name))
        (tmp_path / name).write_text(words * 60)
    choices = {"mode": "branch", "experts": 4, "router": "prompts", "calibration": tuple(files)}
    target = upcycle(folders, tmp_path / "moe", **choices, **TEXT)
    assert verify(folders, target, **QUICK)["passed"]
    gate = weights(target)["model.layers.0.mlp.gate.weight"]
    assert torch.equal(gate[:2], gate[2:])
    for number, (folder, file) in enumerate(zip(folders, files, strict=True)):
        seen, opened = [], open_source(folder)
        run_by_layers(
            opened, _ids(opened, Path(file).read_text(), 256, 1, True), lambda i, x, c, s=seen: s.append(x), lambda n: 0
        )
        best = (seen[0] @ gate[:2].T).argmax(1)
        assert (best == number).float().mean() >= 0.9
    with pytest.raises(ValueError, match="needs a text for each of the 2 sources, got 1"):
        upcycle(folders, tmp_path / "out", **{**choices, "calibration": tuple(files[:1])}, **TEXT)
    assert not list(tmp_path.glob("*out*"))


def test_interrupted_it_goes_on_without_reading_again(tmp_path, monkeypatch):
    from hf_moe.upcycling import calibration, stream

    source = save_dense(tmp_path / "dense", tokenizer=True)
    choices = {"mode": "cluster", "experts": 4, **TEXT}
    whole = upcycle(source, tmp_path / "whole", **choices)
    produced = stream._produced

    def fail(source, tensor, *rest):
        if tensor.name == "model.layers.1.mlp.experts.2.up_proj.weight":
            raise OSError("the power went")
        return produced(source, tensor, *rest)

    monkeypatch.setattr(stream, "_produced", fail)
    with pytest.raises(OSError, match="the power went"):
        upcycle(source, tmp_path / "moe", **choices)
    monkeypatch.setattr(stream, "_produced", produced)
    monkeypatch.setattr(calibration, "_learn", lambda *_: pytest.fail("learnt again"))
    target = upcycle(source, tmp_path / "moe", **choices)
    for path in target.glob("*.safetensors"):
        assert path.read_bytes() == (whole / path.name).read_bytes()
    # A neuron in another place is found.
    record = json.loads((target / "provenance.json").read_text())
    assert record["files"]["calibration.safetensors"]
    data = bytearray((target / "calibration.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "calibration.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"calibration\.safetensors has changed since it was written"):
        verify(source, target, **QUICK)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"mode": "cluster", "experts": 5}, r"intermediate_size=64 is not divisible by shards=5 \(experts and shared"),
        ({"mode": "cluster", "experts": 1}, "mode='cluster' needs at least 2 experts, got 1"),
        ({"mode": "cluster", "calibration_tokens": 1}, "calibration_tokens=1 must be a whole number of at least 2"),
        ({"router": "activity"}, "router='activity' belongs to mode='cluster', not to mode='copy'"),
        ({"router": "prompts", "mode": "branch"}, "needs calibration: a file of prompts for each source"),
        ({"calibration": ("a",)}, "not read with mode='copy', router='random' and attention='exact'"),
        ({"router": "centroids", "calibration_tokens": 10**7}, "text has .* tokens, 9999872 are needed"),
    ],
)
def test_choices_that_cannot_be(tmp_path, choices, message):
    source = save_dense(tmp_path / "dense", tokenizer=True)
    with pytest.raises(ValueError, match=message):
        upcycle(source, tmp_path / "moe", progress=False, **choices)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
