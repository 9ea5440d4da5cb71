"""The examples' tiny runs, and the helpers of the one that makes the text."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# Trainer, TRL and peft announce their own coming changes; a tiny run holds no GPU.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def run(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_finetune_trainer(tmp_path, monkeypatch, capsys):
    run("finetune_trainer.py", monkeypatch, "--tiny", "--output", tmp_path)
    first, last = (float(word) for word in capsys.readouterr().out.split("\nloss ")[1].split(",")[0].split(" → "))
    assert last < 0.8 * first
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "experts" / "load.png").exists()


@pytest.mark.parametrize(
    "words", [(), ("--preset", "all", "--dropout", "0.1", "--checkpointing")], ids=["plain", "all"]
)
def test_finetune_lora(tmp_path, monkeypatch, capsys, words):
    run("finetune_lora.py", monkeypatch, "--tiny", "--merge", "--output", tmp_path, *words)
    first, last = (float(word) for word in capsys.readouterr().out.split("\nloss ")[1].split(",")[0].split(" → "))
    assert last < 0.8 * first
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl and datasets")
def test_finetune_trl(tmp_path, monkeypatch, capsys):
    run("finetune_trl.py", monkeypatch, "--tiny", "--output", tmp_path)
    first, last = (float(word) for word in capsys.readouterr().out.split("\nloss ")[1].split(",")[0].split(" → "))
    assert last < 0.8 * first


def test_continue_pretraining(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("before\n\n| model | loss |\n|---|---|\n| old | 1 |\n\nafter\n")
    run("continue_pretraining.py", monkeypatch, "--tiny", "--inits", "dense", "copy", "--output", tmp_path)
    # A later run adds to the table.
    run("continue_pretraining.py", monkeypatch, "--tiny", "--inits", "split", "drop", "--output", tmp_path)
    assert "s of training left" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n\n| model | parameters")
    assert readme.endswith("\n\nafter\n")
    assert all(f"\n| {row['init']}: " in readme and f"{row['heldout_loss']:.4f}" in readme for row in rows)
    assert [row["init"] for row in rows] == ["dense", "copy", "split", "drop"]
    assert {row["tokens"] for row in rows} == {128}
    curves = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert curves["dense"][0][1] == pytest.approx(curves["split"][0][1], abs=1e-5)
    assert curves["dense"][0][1] == pytest.approx(curves["copy"][0][1], abs=1e-5)
    assert all(row["heldout_loss"] == round(curves[row["init"]][-1][1], 4) for row in rows)


def test_heal_compressed(tmp_path, monkeypatch):
    words = ["--tiny", "--ratios", 0.25, "--learning-rate", 3e-3, "--output", tmp_path]
    run("latent/heal.py", monkeypatch, *words)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    record = json.loads((tmp_path / "healed.json").read_text())["0.25"]
    assert (row["ratio"], row["method"], row["heal_tokens"]) == (0.25, "ours", 2560)
    assert row["kl"] == record["before"]["kl"] > 1.2 * record["after"]["kl"]
    assert row["ppl_healed"] == round(record["after"]["ppl"], 4)


def test_committed_results_are_of_the_size_that_they_claim():
    folder = EXAMPLES / "continued"
    rows = {row["init"]: row for row in json.loads((folder / "results.json").read_text())}
    assert set(rows["dense"]) == {"model", "init", "tokens", "heldout_loss", "max_over_mean_load"}
    assert all(row["tokens"] == rows["dense"]["tokens"] >= 20_000_000 for row in rows.values())
    assert rows["copy"]["heldout_loss"] < rows["dense"]["heldout_loss"]
    assert all(row["max_over_mean_load"] <= 2 for row in rows.values() if row["init"] != "dense")


def test_text_of_a_manual_page(tmp_path):
    module = runpy.run_path(str(EXAMPLES / "continued" / "prepare_text.py"))
    page = (
        "<html><head><title>x</title></head><body><p>Two\n words &amp; <b>more</b>.</p><pre>a\n  b</pre></body></html>"
    )
    assert [part for part in module["plain"](page) if part] == ["Two words & more.", "a\n  b"]
    assert module["english"]("The use of it is to be read in the way that is for it.")
    assert not module["english"]("α β γ δ ε of the")
    assert not module["english"]("int main void return struct char")
