"""Healing of folders, by the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import save_dense
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.upcycling import heal, upcycle, verify
from hf_moe.upcycling.lock import locked

# Trainer announces its own coming changes; a tiny run holds no GPU.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def folders(tmp_path):
    """A source, and a model of it whose attention was damaged."""
    source = save_dense(tmp_path / "dense", "llama_biases", tokenizer=True)
    folder = upcycle(source, tmp_path / "moe", experts=1, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.add_(torch.randn_like(layer.self_attn.kv_b_proj.weight), alpha=0.2)
    model.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(" ".join(str(n * n) for n in range(700)))
    return source, folder, tmp_path


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_heal_command(folders):
    source, folder, tmp_path = folders
    ids = np.frombuffer(b"A held-out text, longer than two rows of it" * 2, dtype=np.uint8)
    np.save(tmp_path / "heldout.npy", ids)
    words = ["heal", source, folder, tmp_path / "healed", "--text", tmp_path / "text.txt", "-q", "--length", 32]
    words += ["--batch", 4, "--tokens", 5000, "--learning-rate", 3e-3, "--heldout", tmp_path / "heldout.npy"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "healed" / "healing.json").read_text())
    assert record["after"]["kl"] < 0.7 * record["before"]["kl"]
    assert record["before"]["tokens"] == len(ids) // 32 * 32
    assert record["settings"]["steps"] == 5000 // 128
    assert f"KL from the source {record['before']['kl']:.4f} -> {record['after']['kl']:.4f}" in result.stdout
    card = (tmp_path / "healed" / "README.md").read_text()
    assert card.count("## Healed") == 1
    assert f"| {record['before']['kl']:.4f} | {record['after']['kl']:.4f} |" in card
    assert "provenance.json" not in card
    assert "The weights have been trained" in card
    assert "hf-moe heal dense moe healed --text text.txt --heldout heldout.npy --train all --tokens 4992" in card
    assert (tmp_path / "healed" / "tokenizer.json").is_file()
    assert not (tmp_path / ".healed.partial").exists()
    with pytest.raises(ValueError, match="only what hf-moe upcycle wrote can be verified"):
        verify(source, tmp_path / "healed", progress=False)


def test_card_says_what_was_before_healing(tmp_path):
    source = save_dense(tmp_path / "dense", tokenizer=True)
    choices = {"attention": "compress", "cache_ratio": 0.5, "calibration_tokens": 512, "experts": 1}
    folder = upcycle(source, tmp_path / "half", progress=False, **choices)
    verify(source, folder, tokens=64, new_tokens=4, progress=False)
    ids = np.random.default_rng(0).integers(1, 90, 2000)
    np.save(tmp_path / "ids.npy", ids)
    healing = {"length": 32, "batch": 4, "tokens": 256, "progress": False}
    heal(source, folder, tmp_path / "healed", [tmp_path / "ids.npy"], **healing)
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "A dense model with latent attention, made from `dense`" in card
    assert "\n# healed\n" in card
    assert card.count('from_pretrained("healed"') == 2
    assert "## Price of the smaller cache, before healing\n" in card
    assert "| | exact attention | before healing |" in card
    assert "Measured against the source" not in card
    # Healed once more, only the last time is told.
    heal(source, tmp_path / "healed", tmp_path / "twice", [tmp_path / "ids.npy"], **healing)
    twice = (tmp_path / "twice" / "README.md").read_text()
    assert twice.count("## Healed") == twice.count("## Licence") == twice.count("before healing |") == 1
    assert "hf-moe heal dense healed twice --text ids.npy" in twice


def test_interrupted_run(folders):
    source, folder, tmp_path = folders
    choices = {"length": 32, "batch": 4, "tokens": 1024, "save_steps": 2, "progress": False}
    (tmp_path / ".healed.partial").mkdir()
    (tmp_path / ".healed.partial" / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"\.healed\.partial is in the way, and no interrupted run's: remove it, or"):
        heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], **choices)
    (tmp_path / ".healed.partial" / "checkpoints").rmdir()
    (tmp_path / ".healed.partial").rmdir()
    heal(source, folder, tmp_path / "first", [tmp_path / "text.txt"], resume=True, **choices)
    settings = json.loads((tmp_path / "first" / "healing.json").read_text())["settings"]
    assert (settings["model"], settings["text"]) == (folder.name, ["text.txt"])
    settings |= {"tokens": 1024, "model": str(folder.absolute()), "text": [str(tmp_path / "text.txt")]}
    (tmp_path / ".healed.partial").mkdir()
    (tmp_path / ".healed.partial" / "settings.json").write_text(json.dumps(settings | {"seed": 3}))
    with pytest.raises(ValueError, match=r"the interrupted run in .* had another seed"):
        heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], resume=True, **choices)
    (tmp_path / ".healed.partial" / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text(" ".join(str(n * n + 1) for n in range(700)))
    with pytest.raises(ValueError, match=r"the interrupted run in .* had another text_sha256;"):
        heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], resume=True, **choices)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("short"), "the text has 0 rows of 512 tokens to train on and 0 held out"),
        (lambda path: np.save(path.open("wb"), np.ones((2, 3))), "holds an array of float64 and 2 dimensions"),
        (lambda path: np.save(path.open("wb"), np.full(3000, -3)), "holds the token -3, and ids begin at 0"),
        (lambda path: path.write_bytes(b"nonsense"), r"ids\.npy holds no array that numpy.save wrote"),
    ],
)
def test_texts_that_are_refused(folders, write, message):
    source, folder, tmp_path = folders
    path = tmp_path / ("short.txt" if "short" in message or "rows" in message else "ids.npy")
    write(path)
    with pytest.raises(ValueError, match=message):
        heal(source, folder, tmp_path / "healed", [path], progress=False)
    with pytest.raises(ValueError, match="holds a 'llama' model; only hf_moe models are healed"):
        heal(source, source, tmp_path / "healed", [path], progress=False)
    assert not (tmp_path / ".healed.partial").exists()


def test_killed_while_the_healed_model_is_written(folders, monkeypatch):
    source, folder, tmp_path = folders
    choices = {"length": 32, "batch": 4, "tokens": 256, "save_steps": 2, "progress": False}
    copyfile = shutil.copyfile

    def killed(old, new):
        if Path(new).name != "tokenizer.json":
            return copyfile(old, new)
        Path(new).write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], **choices)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"\.healed\.partial is in the way: resume the interrupted run, or remove it"):
        heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], **choices)
    with locked(tmp_path / ".healed.partial"), pytest.raises(ValueError, match="another process is writing this"):
        heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], resume=True, **choices)
    heal(source, folder, tmp_path / "healed", [tmp_path / "text.txt"], resume=True, **choices)
    assert (tmp_path / "healed" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert list(tmp_path.glob(".healed*")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "the model's depth in layers of 3 is not the source's of 2: name the source"),
        ({"hidden_size": 32}, "the model's width of 48 is not the source's of 32"),
        ({"vocab_size": 300}, "the model's vocabulary of 258 is not the source's of 300"),
    ],
)
def test_another_source_is_refused(folders, changes, message):
    _, folder, tmp_path = folders
    other = save_dense(tmp_path / "other", "llama_biases", **changes)
    with pytest.raises(ValueError, match=message):
        heal(other, folder, tmp_path / "healed", [tmp_path / "text.txt"], length=32, progress=False)
    assert list(tmp_path.glob(".healed*")) == []
