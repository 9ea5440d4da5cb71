"""Fifty processes killed at random: the target is never there in part, and the last run's bytes are the same."""

import json
import os
import subprocess
import sys

import pytest
from dense import save_dense

from hf_moe.upcycling import convert, upcycle, verify

# Forked from one process that has everything imported, so that a run takes as long as its work.
SCRIPT = """
import hashlib, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from hf_moe.upcycling import upcycle

source, work = sys.argv[1], Path(sys.argv[2])
target, choices = work / "moe", dict(experts=3, top_k=2, max_shard_bytes=60_000, progress=False)

def start():
    child = os.fork()
    if child == 0:
        try:
            upcycle(source, target, **choices)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def whole():
    begin = time.monotonic()
    assert os.waitpid(start(), 0)[1] == 0
    assert not list(work.glob(".*"))
    digest = hashlib.sha256()
    for path in sorted(target.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    shutil.rmtree(target)
    return digest.hexdigest(), time.monotonic() - begin

whole()
expected, seconds = whole()
clock, kills, left = random.Random(0), 0, set()
while kills < 50:
    for _ in range(clock.randint(1, 3)):
        child = start()
        time.sleep(clock.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        kills += os.WIFSIGNALED(status)
        if target.exists():
            break
        journal = work / ".moe.partial" / "journal.jsonl"
        left.add(journal.read_bytes().count(b"\\n") if journal.exists() else 0)
    if target.exists():
        assert (target / "provenance.json").exists()
        shutil.rmtree(target)
        continue
    assert whole()[0] == expected, "another result after a kill"
print(kills, len(left))
"""


def test_killed_at_random(tmp_path):
    source = save_dense(tmp_path / "dense", max_shard_size="100KB")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "work")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kills, places = map(int, result.stdout.split())
    assert kills >= 50
    # The kills fell into different places of the conversion, not all before or after it.
    assert places >= 5


@pytest.mark.parametrize("revealed", [False, True])
def test_killed_at_the_last_step(tmp_path, monkeypatch, revealed):
    source = save_dense(tmp_path / "dense")
    choices = {"experts": 3, "top_k": 2, "progress": False}
    rename = os.rename

    def killed(old, new):
        if revealed:
            rename(old, new)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, tmp_path / "moe", **choices)
    monkeypatch.undo()
    assert (tmp_path / "moe").exists() == revealed
    if not revealed:
        upcycle(source, tmp_path / "moe", **choices)
    assert verify(source, tmp_path / "moe", tokens=16, new_tokens=2, progress=False)
    assert list(tmp_path.glob(".*")) == []


def interrupted(*_):
    raise KeyboardInterrupt


def test_killed_while_another_plans_files_are_removed(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense", tokenizer=True)
    choices = {"mode": "cluster", "experts": 4, "calibration_tokens": 256, "progress": False}
    expected = upcycle(source, tmp_path / "expected", seed=2, **choices) / "calibration.safetensors"
    monkeypatch.setattr(convert, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, tmp_path / "moe", seed=1, **choices)
    monkeypatch.setattr(convert, "_clear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, tmp_path / "moe", seed=2, **choices)
    monkeypatch.undo()
    upcycle(source, tmp_path / "moe", seed=2, **choices)
    assert (tmp_path / "moe" / "calibration.safetensors").read_bytes() == expected.read_bytes()


def test_killed_while_small_files_are_written(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense")
    (source / "generation_config.json").unlink()

    def half_written(self, folder):
        (folder / "generation_config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", half_written)
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, tmp_path / "moe", experts=2, progress=False)
    monkeypatch.undo()
    upcycle(source, tmp_path / "moe", experts=2, progress=False)
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text())["eos_token_id"] == 257


def test_killed_while_a_refused_conversion_is_removed(tmp_path, monkeypatch):
    source = save_dense(tmp_path / "dense")
    choices = {"experts": 2, "progress": False}

    def refused(*_):
        raise ValueError("refused")

    monkeypatch.setattr(convert, "write_rest", refused)
    monkeypatch.setattr(convert.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upcycle(source, tmp_path / "moe", **choices)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / ".moe.partial").iterdir()] == ["journal.jsonl"]
    assert upcycle(source, tmp_path / "moe", **choices).is_dir()
