"""The target folder: what is in it, that it appears whole or not at all, and that a later run goes on."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from dense import save_dense
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from hf_moe.upcycling import convert as convert_module
from hf_moe.upcycling import stream as stream_module
from hf_moe.upcycling import upcycle

CHOICES = {"mode": "copy", "experts": 3, "top_k": 2, "max_shard_bytes": 60_000, "progress": False}


def contents(folder):
    """Name → bytes of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path):
    return save_dense(tmp_path / "dense", tokenizer=True, max_shard_size="100KB")


def test_folder_holds_all_that_is_shared(source, tmp_path):
    target = upcycle(source, tmp_path / "moe", **CHOICES)
    names = {path.name for path in target.iterdir()}
    assert names >= {
        "README.md",
        "attention_hf_moe.py",
        "chat_template.jinja",
        "config.json",
        "configuration_hf_moe.py",
        "generation_config.json",
        "model.safetensors.index.json",
        "modeling_hf_moe.py",
        "provenance.json",
        "routing_hf_moe.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((target / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_moe.HfMoeForCausalLM"
    assert config["architectures"] == ["HfMoeForCausalLM"]
    assert AutoTokenizer.from_pretrained(target).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = {
        name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(target / file).items()
    }
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert "model.layers.2.mlp.experts.1.up_proj.weight" in tensors
    assert len(set(index["weight_map"].values())) > 2
    assert list(tmp_path.glob(".*")) == []


def test_two_runs_give_the_same_bytes(source, tmp_path):
    first = contents(upcycle(source, tmp_path / "moe", **CHOICES))
    shutil.rmtree(tmp_path / "moe")
    assert contents(upcycle(source, tmp_path / "moe", **CHOICES)) == first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_kept_or_chosen(tmp_path, dtype):
    source = save_dense(tmp_path / "dense", "llama_biases", dtype=getattr(torch, dtype))
    kept = upcycle(source, tmp_path / "kept", **CHOICES)
    assert AutoConfig.from_pretrained(kept).dtype == getattr(torch, dtype)
    chosen = upcycle(source, tmp_path / "chosen", dtype="float32", **CHOICES)
    assert AutoConfig.from_pretrained(chosen).dtype == torch.float32
    files = sorted(chosen.glob("*.safetensors"))
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float32}


class Stop(BaseException):
    """Ends a run the way a signal would, between two tensors."""


@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_interrupted_run_is_continued(source, tmp_path, monkeypatch, after):
    whole = contents(upcycle(source, tmp_path / "moe", **CHOICES))
    shutil.rmtree(tmp_path / "moe")

    produce = stream_module.produce

    def stopping(*arguments):
        for count, produced in enumerate(produce(*arguments)):
            if count == after:
                raise Stop
            yield produced

    monkeypatch.setattr(stream_module, "produce", stopping)
    with pytest.raises(Stop):
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert not (tmp_path / "moe").exists()

    written = []

    def counting(*arguments):
        for produced in produce(*arguments):
            written.append(produced.tensor.name)
            yield produced

    monkeypatch.setattr(stream_module, "produce", counting)
    assert contents(upcycle(source, tmp_path / "moe", **CHOICES)) == whole
    index = json.loads(whole["model.safetensors.index.json"])
    assert len(written) == len(index["weight_map"]) - after


def test_damaged_partial_result_is_written_again(source, tmp_path, monkeypatch):
    whole = contents(upcycle(source, tmp_path / "moe", **CHOICES))
    os.rename(tmp_path / "moe", tmp_path / "kept")
    monkeypatch.setattr(convert_module, "write_rest", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        upcycle(source, tmp_path / "moe", **CHOICES)
    monkeypatch.undo()
    shard = tmp_path / ".moe.partial" / "model-00002-of-00003.safetensors"
    shard = sorted((tmp_path / ".moe.partial").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with (tmp_path / ".moe.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"name": "cut')
    assert contents(upcycle(source, tmp_path / "moe", **CHOICES)) == whole


def test_other_choices_start_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "write_rest", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        upcycle(source, tmp_path / "moe", **CHOICES)
    monkeypatch.undo()
    target = upcycle(source, tmp_path / "moe", **{**CHOICES, "seed": 1})
    fresh = contents(upcycle(source, tmp_path / "fresh", **{**CHOICES, "seed": 1}))
    assert {k: v for k, v in contents(target).items() if k != "README.md"} == {
        k: v for k, v in fresh.items() if k != "README.md"
    }


def test_full_disk_keeps_the_partial_folder_and_says_so(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_module, "write_weights", full)
    with pytest.raises(OSError, match=r"disk is full: moe needs [\d,]+ bytes.*goes on from \.moe\.partial"):
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert not (tmp_path / "moe").exists()
    monkeypatch.undo()
    assert upcycle(source, tmp_path / "moe", **CHOICES).is_dir()


def test_too_small_disk_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"[\d,]+ bytes needed, 1,000 free"):
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_what_another_command_left_is_not_cleared(source, tmp_path):
    left = tmp_path / ".moe.partial" / "checkpoints"
    left.mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"\.moe\.partial is in the way"):
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert left.is_dir()


def test_card_tells_all_that_was_chosen(source, tmp_path):
    choices = CHOICES | {"router_std": 0.5, "max_shard_bytes": 100_000}
    card = (upcycle(source, tmp_path / "moe", **choices) / "README.md").read_text()
    assert "--router-std 0.5 --max-shard-bytes 100000 --seed 0" in card


def test_two_processes_do_not_write_one_target(source, tmp_path):
    from hf_moe.upcycling.journal import Journal

    (tmp_path / ".moe.partial").mkdir()
    held = Journal(tmp_path / ".moe.partial", "other")
    with pytest.raises(ValueError, match="another process is writing this target"):
        upcycle(source, tmp_path / "moe", **CHOICES)
    held.close()
    assert (tmp_path / ".moe.partial").is_dir()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(kind, folder):
    """Spoil a single-file source in one way; returns the message that must come."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if kind == "truncated":
        weights.write_bytes(data[:-100])
        return r"model.safetensors is truncated or corrupt: its header promises \d+ bytes, it has \d+"
    if kind == "corrupt header":
        weights.write_bytes(data[:8] + b"x" * 40 + data[48:])
        return "model.safetensors is corrupt: its header"
    if kind == "not safetensors":
        weights.write_bytes(b"abc")
        return "3 bytes, a safetensors file has at least 8"
    if kind == "no weights":
        weights.unlink()
        return "holds no weights"
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        return "a pickle can run any code"
    if kind == "unknown architecture":
        edit_config(folder, model_type="gpt2")
        return "unknown architecture 'gpt2'; known are .*llama"
    if kind == "no config":
        (folder / "config.json").unlink()
        return "holds no config.json"
    if kind == "config is not JSON":
        (folder / "config.json").write_text("{")
        return "is not JSON"
    if kind == "config is a list":
        (folder / "config.json").write_text("[]")
        return "holds a list, not an object of options"
    if kind == "layers are a word":
        edit_config(folder, num_hidden_layers="x")
        return "num_hidden_layers='x' must be a whole number of at least 1"
    if kind == "no heads":
        edit_config(folder, num_attention_heads=0)
        return "num_attention_heads=0 must be a whole number of at least 1"
    if kind == "option of another type":
        edit_config(folder, rms_norm_eps="small")
        return "config.json is not valid: .*rms_norm_eps"
    if kind == "mlp bias":
        edit_config(folder, mlp_bias=True)
        return "llama with mlp_bias=True cannot be converted"
    if kind == "unknown activation":
        edit_config(folder, hidden_act="foo")
        return "the activation 'foo' is not known; known are silu"
    if kind == "unknown rope":
        edit_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
        return "rope_type='spiral' is not known; known are default, linear"
    if kind == "rope of no length":
        edit_config(folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5})
        return "the target cannot hold this model: factor=0.5 of rope_type='linear' must be at least 1"
    if kind == "head of its own, said to be tied":
        edit_config(folder, tie_word_embeddings=True)
        return "dense has a lm_head.weight other than model.embed_tokens.weight, and tie_word_embeddings=True"
    if kind == "shape":
        edit_config(folder, intermediate_size=72)
        return r"has the shape \[64, 48\], the configuration says \[72, 48\]"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing tensor":
        del tensors[name]
        message = f"{name} is missing from the source"
    elif kind == "unknown tensor":
        tensors["model.layers.1.adapter.weight"] = torch.zeros(2)
        message = "model.layers.1.adapter.weight is no tensor of LlamaForCausalLM"
    elif kind == "NaN":
        tensors[name][3, 3] = float("nan")
        message = f"{name} holds NaN or infinity"
    elif kind == "infinity":
        tensors[name][0, 0] = -torch.inf
        message = f"{name} holds NaN or infinity"
    elif kind == "the same tensor twice":
        save_file({name: tensors[name]}, folder / "a.safetensors")
        weights.rename(folder / "b.safetensors")
        weights = folder / "b.safetensors"
        message = f"{name} is in a.safetensors and in b.safetensors: an index must choose"
    save_file(tensors, weights, metadata={"format": "pt"})
    return message


DAMAGES = [
    "truncated",
    "corrupt header",
    "not safetensors",
    "no weights",
    "pickle",
    "unknown architecture",
    "no config",
    "config is not JSON",
    "config is a list",
    "layers are a word",
    "no heads",
    "option of another type",
    "mlp bias",
    "unknown activation",
    "unknown rope",
    "rope of no length",
    "head of its own, said to be tied",
    "shape",
    "missing tensor",
    "unknown tensor",
    "NaN",
    "infinity",
    "the same tensor twice",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_source_is_one_sentence_and_leaves_nothing(tmp_path, kind):
    source = save_dense(tmp_path / "dense")
    message = damage(kind, source)
    with pytest.raises(ValueError, match=message) as caught:
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    "kind", ["missing shard", "index lies", "index escapes", "index names a pickle", "index is damaged"]
)
def test_bad_index(source, tmp_path, kind):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = "model.norm.weight", index["weight_map"]["model.norm.weight"]
    if kind == "missing shard":
        (source / shard).unlink()
        message = f"{shard} is missing"
    elif kind == "index lies":
        other = next(file for file in index["weight_map"].values() if file != shard)
        index["weight_map"][name] = other
        message = f"places {name} in {other}, which does not hold it"
    elif kind == "index escapes":
        index["weight_map"][name] = "../dense/" + shard
        message = "a path outside of the folder"
    elif kind == "index names a pickle":
        index["weight_map"][name] = "pytorch_model.bin"
        message = "names pytorch_model.bin, which is not a safetensors file"
    else:
        index = {"weight_map": [1]}
        message = "no weight_map"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"experts": 2, "top_k": 3}, "top_k=3 is above experts=2"),
        ({"experts": 1, "top_k": 5}, "top_k=5 is above experts=1"),
        ({"experts": 0}, "experts=0 must be a whole number of at least 1"),
        ({"experts": 2.5}, "experts=2.5 must be a whole number"),
        ({"mode": "noise", "noise_std": float("nan")}, "noise_std=nan must be a number between 0 and"),
        ({"mode": "noise", "noise_std": float("inf")}, "noise_std=inf must be a number between 0 and"),
        ({"mode": "drop", "drop_ratio": 1.5}, "drop_ratio=1.5 must be a number between 0 and 1"),
        ({"router_std": float("nan")}, "router_std=nan must be a number between 0 and"),
        ({"dense_layers": ("1",)}, "must be whole numbers"),
        ({"mode": "magic"}, "mode='magic' is unknown; known are copy, split"),
        ({"dense_layers": (7,)}, "dense layer 7 is none of the 3 layers"),
        (
            {"mode": "split", "shards": 5, "experts": 10, "top_k": 5},
            "intermediate_size=64 is not divisible by shards=5",
        ),
        (
            {"mode": "split", "shards": 4, "experts": 6, "top_k": 4},
            "experts=6 is not a multiple of the 4 routed shards",
        ),
        (
            {"mode": "split", "shards": 2, "router": "zero", "experts": 4, "top_k": 2, "split_scale": "down"},
            "router='zero' needs split_scale='groups', not 'down'",
        ),
        ({"split_scale": "groups"}, "split_scale='groups' belongs to mode='split'"),
        ({"shards": 2}, "belong to mode='split'"),
    ],
)
def test_bad_choices(source, tmp_path, choices, message):
    with pytest.raises(ValueError, match=message):
        upcycle(source, tmp_path / "moe", **{**CHOICES, **choices})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_existing_target_and_missing_parent(source, tmp_path):
    (tmp_path / "moe").mkdir()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        upcycle(source, tmp_path / "moe", **CHOICES)
    with pytest.raises(ValueError, match="does not exist, so moe cannot be made"):
        upcycle(source, tmp_path / "nowhere" / "moe", **CHOICES)


def test_windows_is_refused_in_one_sentence(source, tmp_path, monkeypatch):
    """Before anything is written; what only reads needs none of what Windows lacks."""
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match="on Linux and macOS only"):
        upcycle(source, tmp_path / "moe", **CHOICES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_hub_id_without_network(tmp_path):
    with pytest.raises(ConnectionError, match="'nobody/nothing' is no folder here and the Hub cannot be reached"):
        upcycle("nobody/nothing", tmp_path / "moe", progress=False)
    with pytest.raises(ValueError, match="does not exist, and is not a Hub id"):
        upcycle("no such folder", tmp_path / "moe", progress=False)


def test_killed_process_leaves_nothing_visible_and_is_continued(source, tmp_path):
    whole = contents(upcycle(source, tmp_path / "moe", **CHOICES))
    shutil.rmtree(tmp_path / "moe")
    # Slowed down, so that the kill falls into the writing.
    script = f"""
import time
from hf_moe.upcycling import stream, upcycle
produce = stream.produce
def slow(*arguments):
    for produced in produce(*arguments):
        time.sleep(0.02)
        yield produced
stream.produce = slow
upcycle({str(source)!r}, {str(tmp_path / "moe")!r}, **{CHOICES!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    journal = tmp_path / ".moe.partial" / "journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "moe").exists()
    assert contents(upcycle(source, tmp_path / "moe", **CHOICES)) == whole
