"""The README's Python runs as it stands, one block after the other, in a folder that holds a dense model."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner
from upcycling.dense import save_dense

from hf_moe.cli import app
from hf_moe.upcycling.formats import matrix

README = (Path(__file__).parents[1] / "README.md").read_text()


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
    root = Path(__file__).parents[1]
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (root / link).exists(), link
