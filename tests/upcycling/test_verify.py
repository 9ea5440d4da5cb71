"""verify passes what is right, and fails loudly when a byte or a number is off."""

import json

import pytest
import torch
from dense import save_dense
from safetensors.torch import load_file, save_file

from hf_moe.upcycling import VerificationError, upcycle, verify

QUICK = {"tokens": 200, "new_tokens": 12, "progress": False}


@pytest.fixture
def source(tmp_path):
    return save_dense(tmp_path / "dense", tokenizer=True)


@pytest.fixture
def target(source, tmp_path):
    return upcycle(source, tmp_path / "moe", experts=3, top_k=2, max_shard_bytes=100_000, progress=False)


def test_certificate(source, target):
    certificate = verify(source, target, **QUICK)
    assert certificate == json.loads((target / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["logits"]["tokens"] == 200
    assert certificate["logits"]["max_abs_difference"] <= 1e-5
    assert certificate["logits"]["top1_agreement"] == 1.0
    assert certificate["decode"]["greedy_equal"]
    assert certificate["decode"]["greedy_tokens"] == 12
    assert "language reference" in certificate["text"]
    names = [tensor["name"] for tensor in certificate["tensors"]]
    by_name = dict(zip(names, certificate["tensors"], strict=True))
    expert = by_name["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert expert["sources"][0]["name"] == "model.layers.1.mlp.up_proj.weight"
    assert expert["sources"][0]["sha256"] == expert["sha256"]
    assert by_name["model.layers.1.self_attn.kv_b_proj.weight"]["rule"] == "select_groups"
    # A second run finds the first one's certificate in the folder.
    assert verify(source, target, **QUICK) == certificate


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [-1, -40_000, 9, 3000])
@pytest.mark.parametrize("shard", [0, -1])
def test_a_byte_of_the_weights_is_off(source, target, shard, position):
    flip(sorted(target.glob("*.safetensors"))[shard], position)
    with pytest.raises(VerificationError):
        verify(source, target, **QUICK)
    assert json.loads((target / "certificate.json").read_text())["passed"] is False


@pytest.mark.parametrize("name", ["config.json", "modeling_hf_moe.py", "tokenizer.json"])
def test_a_byte_of_another_file_is_off(source, target, name):
    flip(target / name, -2)
    with pytest.raises(VerificationError, match=f"{name} has changed"):
        verify(source, target, **QUICK)


def test_a_source_that_changed(source, target):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"experts\.0\.down_proj\.weight in .* differs from what its source"):
        verify(source, target, **QUICK)


def test_numbers_that_are_off(source, target):
    with pytest.raises(VerificationError, match=r"max \|Δlogit\| is .*, tolerance 1e-12|cached and uncached"):
        verify(source, target, tolerance=1e-12, **QUICK)


def test_text(source, target):
    text = "The quick brown fox jumps over the lazy dog. " * 10
    assert verify(source, target, text=text, **QUICK)["text"] == "given text"
    with pytest.raises(ValueError, match="the text has 5 tokens, 200 are needed"):
        verify(source, target, text="short", **QUICK)


def test_card_says_that_bytes_are_off(source, target):
    verify(source, target, tokens=64, new_tokens=2, progress=False)
    assert "| result | passed |" in (target / "README.md").read_text()
    (target / "config.json").write_text("{}")
    with pytest.raises(VerificationError):
        verify(source, target, tokens=64, new_tokens=2, progress=False)
    card = (target / "README.md").read_text()
    assert "| result | failed: config.json has changed since it was written |" in card
    assert "greedy tokens" not in card


def test_a_source_of_the_name_conversion(tmp_path):
    source = save_dense(tmp_path / "conversion")
    target = upcycle(source, tmp_path / "moe", experts=2, progress=False)
    assert verify(source, target, tokens=20, new_tokens=2, progress=False)["passed"]


def test_without_a_tokenizer(tmp_path):
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    target = upcycle(source, tmp_path / "moe", progress=False)
    assert verify(source, target, **QUICK)["text"] == "random tokens, seed 0"


def test_a_folder_of_other_origin(source):
    with pytest.raises(ValueError, match=r"holds no provenance.json, .* not a model that was exported, imported"):
        verify(source, source, **QUICK)


@pytest.mark.parametrize(("count", "number"), [("tokens", 1), ("tokens", 0), ("new_tokens", 0)])
def test_too_few_tokens(source, target, count, number):
    with pytest.raises(ValueError, match=f"{count}={number} (must be|at least)"):
        verify(source, target, **{**QUICK, count: number})
    assert not (target / "certificate.json").exists()


def test_a_source_of_one_position(tmp_path):
    source = save_dense(tmp_path / "dense", max_position_embeddings=1)
    target = upcycle(source, tmp_path / "moe", progress=False)
    with pytest.raises(ValueError, match="tokens=1 must be at least 2"):
        verify(source, target, **QUICK)


@pytest.mark.parametrize(("tokens", "new_tokens", "decoded"), [(80, 8, 8), (62, 90, 64)])
def test_decoding_stays_below_the_length_at_which_the_rope_changes(tmp_path, tokens, new_tokens, decoded):
    """At 64 positions, where keys that were cached before do not fit behind; logits are compared beyond."""
    source = save_dense(tmp_path / "dense", "phi3_longrope")
    target = upcycle(source, tmp_path / "moe", experts=2, progress=False)
    certificate = verify(source, target, tokens=tokens, new_tokens=new_tokens, progress=False)
    assert certificate["logits"]["tokens"] == tokens
    assert certificate["decode"]["greedy_tokens"] == decoded


@pytest.mark.parametrize("record", ["{}", "[]", "{", '{"options": {}, "files": {}, "tensors": []}', "null"])
def test_damaged_provenance(source, target, record):
    (target / "provenance.json").write_text(record)
    with pytest.raises(ValueError, match=r"provenance.json is damaged"):
        verify(source, target, **QUICK)
