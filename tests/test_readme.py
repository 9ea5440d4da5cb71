"""The README's Python runs as it stands, one block after the other, in a folder that holds a dense model."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner
from upcycling.dense import save_dense

from hf_moe.cli import app
from hf_moe.upcycling.formats import matrix

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = "benchmarks/results/"
DECODE = {
    "1 sequence, 1,024 tokens cached": {"op": "decode", "batch": 1, "context": 1024},
    "1 sequence, 65,536": {"op": "decode", "batch": 1, "context": 65536},
    "16 sequences, 8,192 each": {"op": "decode", "batch": 16, "context": 8192},
    "64 sequences, 4,096 each": {"op": "decode", "batch": 64, "context": 4096},
    "prefill, 4 × 4,096": {"op": "prefill", "batch": 4, "context": 4096},
}
EXPERTS = {"Qwen3-30B-A3B": "qwen3-30b", "OLMoE-1B-7B": "olmoe", "DeepSeek-V2-Lite": "deepseek-v2-lite"}
LORA = {
    "OLMoE layer, 8,192 tokens": "olmoe-8192",
    "OLMoE layer, 32,768 tokens": "olmoe-32768",
    "Qwen3-30B-A3B layer, 8,192 tokens": "qwen3-30b-8192",
    "Qwen3-30B-A3B layer, 32,768 tokens": "qwen3-30b-32768",
}


# Trainer and peft announce their own coming changes.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_dense(tmp_path / "dense-model", "llama3", tokenizer=True)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_commands_exist():
    commands = [shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("hf-moe ")]
    assert commands
    for _, name, *arguments in commands:
        result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, name
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert option in result.stdout, (name, option)


def test_table_of_formats_is_the_codes():
    for row in matrix():
        assert f"| {' | '.join(row)} |" in README


def test_files_named_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def cells(*starts: str) -> str:
    """What follows these first cells in the only row of a table that begins with them."""
    (found,) = re.findall(rf"^\| {re.escape(' | '.join(starts))} \|(.*)\|$", README, re.MULTILINE)
    return found


def committed(file: str, **wanted: object) -> dict:
    """The only row of a result file with these fields."""
    rows = json.loads((ROOT / "examples" / file).read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    (found,) = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return found


@pytest.mark.parametrize("title", DECODE)
def test_decode_table_is_that_of_the_results(title):
    speed = committed(f"{RESULTS}decode-h100.json", impl="hf_moe", **DECODE[title])["tokens_per_s"]
    theirs = committed(f"{RESULTS}decode-h100.json", impl="transformers-dynamic", **DECODE[title])["tokens_per_s"]
    assert cells(title).startswith(f" **{speed:,.0f}** |")
    assert f"| {theirs:,.0f}" in cells(title)


@pytest.mark.parametrize("tokens", [32768, 8192])
@pytest.mark.parametrize("title", EXPERTS)
def test_experts_table_is_that_of_the_results(title, tokens):
    def speeds(impl: str) -> str:
        case = {"shape": EXPERTS[title], "tokens": tokens, "routing": "uniform", "impl": impl}
        directions = ("forward", "forward+backward")
        found = [committed(f"{RESULTS}experts-h100.json", **case, **{"pass": name})["tflops"] for name in directions]
        return " / ".join(f"{speed:.0f}" for speed in found)

    expected = f" **{speeds('hf_moe_triton')}** | {speeds('sonicmoe')} | {speeds('grouped_mm')} |"
    assert cells(title, str(tokens)).startswith(expected)


@pytest.mark.parametrize("title", LORA)
def test_lora_table_is_that_of_the_results(title):
    rows = [committed(f"{RESULTS}lora-h100.json", case=LORA[title], impl=i) for i in ("hf_moe", "peft", "hf_moe_full")]
    assert cells(title) == " " + " | ".join(f"{r['ms']:.1f} ms, {r['peak_mib'] / 1024:.1f} GiB" for r in rows) + " "


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.375, 0.25])
def test_compression_table_is_that_of_the_results(ratio):
    kl = [committed("latent/results.json", ratio=ratio, method=m)["kl"] for m in ("ours", "unrotated", "activations")]
    assert cells(f"{100 * ratio:g} % of the cache") == f" **{kl[0]:.3f}** | {kl[1]:.3f} | {kl[2]:.3f} "
