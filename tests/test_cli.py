"""The command line: what a person sees, and the status that a script sees."""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from tiny import tiny_model
from typer.testing import CliRunner

from hf_moe.cli import app

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "upcycling"))
from dense import save_dense


def call(*words):
    """Run a command; returns status, standard output and standard error."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def source(tmp_path):
    return save_dense(tmp_path / "dense", tokenizer=True)


def test_help_names_every_command():
    status, output, _ = call("--help")
    assert status == 0
    for command in ("plan", "export", "import", "upcycle", "verify", "tune", "inspect", "heal", "push", "demo"):
        assert command in output
        assert call(command, "--help")[0] == 0


def test_text_that_is_not_utf8(source, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    words = ["--mode", "cluster", "--experts", 4, "--calibration", tmp_path / "latin.txt"]
    status, _, error = call("upcycle", source, tmp_path / "moe", *words)
    assert (status, error) == (1, "Error: a text that was named is not UTF-8, at byte 2: convert it first\n")


def command(*words, **options):
    """The installed `hf-moe` in a process of its own; from a checkout that is not installed, what it would call."""
    installed = Path(sys.executable).with_name("hf-moe")
    start = [str(installed)] if installed.is_file() else [sys.executable, "-m", "hf_moe_command"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | options.pop("environment", {})
    return subprocess.Popen([*start, *map(str, words)], text=True, env=environment, stdout=-1, stderr=-1, **options)


def run_command(*words, **options):
    """Standard output and the modules that were imported."""
    options["environment"] = {"PYTHONPROFILEIMPORTTIME": "1"} | options.get("environment", {})
    process = command(*words, **options)
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output, {line.rpartition("|")[2].strip() for line in error.splitlines() if line.startswith("import time:")}


def test_help_and_plan_wait_for_nothing_they_do_not_need(source):
    output, modules = run_command("--help")
    assert "upcycle" in output
    assert modules.isdisjoint({"torch", "transformers", "numpy"})
    output, modules = run_command("plan", source, "--experts", 4, "--json")
    assert modules.isdisjoint({"torch", "triton"})
    assert json.loads(output) == json.loads(call("plan", source, "--experts", 4, "--json")[1])


def test_plan_where_torch_is_not_installed(source, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError('No module named torch', name=name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    assert "holds at most" in run_command("plan", source, environment={"PYTHONPATH": path})[0]
    process = command("upcycle", source, tmp_path / "moe", environment={"PYTHONPATH": path})
    _, error = process.communicate()
    assert process.returncode == 1
    assert error == "Error: this command needs torch, which is not installed\n"


def test_commands_that_load_a_model_register_it(source, tmp_path):
    call("upcycle", source, tmp_path / "moe", "--experts", 2, "-q")
    assert "is ready" in run_command("export", tmp_path / "moe", tmp_path / "out", "--to", "mixtral", "-q")[0]


@pytest.mark.parametrize("module", ["typer", "numpy"])
def test_interrupt_before_the_command_has_begun(module):
    """Ctrl-C while the command line, or torch for a command, is being imported."""
    # A job in the background would ignore it, and hand that down.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = command("verify", "a", "b", environment={"PYTHONPROFILEIMPORTTIME": "1"}, preexec_fn=heard)
    while not process.stderr.readline().rstrip().endswith(f" {module}"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    said = [line for line in error.splitlines() if line and not line.startswith("import time:")]
    assert said == ["Interrupted."]


def test_upcycle_then_verify(source, tmp_path):
    out = tmp_path / "moe"
    status, output, _ = call("upcycle", source, out, "--experts", 4, "--top-k", 2, "--dense-layers", "0", "-q")
    assert status == 0
    assert "Prove it with: hf-moe verify" in output
    status, output, _ = call("verify", source, out, "--tokens", 100, "--new-tokens", 8, "-q")
    assert status == 0
    assert "top-1 agreement 100.00%" in output
    assert (out / "certificate.json").is_file()
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    assert call("verify", source, out, "--text", text, "--tokens", 100, "--new-tokens", 8, "-q")[0] == 0
    weights = next(out.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    status, _, error = call("verify", source, out, "--tokens", 100, "--new-tokens", 8, "-q")
    assert status == 1
    assert error.startswith("Error: moe fails: ")


def test_printed_commands_can_be_run(tmp_path):
    """Spaces in a name and the branches are in the next command, and in the card's."""
    first, second = save_dense(tmp_path / "my dense"), save_dense(tmp_path / "my other", seed=1)
    out = tmp_path / "my moe"
    status, output, _ = call("upcycle", first, out, "--mode", "branch", "--branch", second, "--experts", 2, "-q")
    assert status == 0
    words = shlex.split(output[output.index("hf-moe ") :])
    assert words == ["hf-moe", "verify", str(first), str(out), "--branch", str(second)]
    assert call(*words[1:], "--tokens", 100, "--new-tokens", 8, "-q")[0] == 0

    card = (out / "README.md").read_text()
    words = shlex.split(next(line for line in card.splitlines() if line.startswith("hf-moe ")))
    assert words[:8] == ["hf-moe", "upcycle", "my dense", "my moe", "--mode", "branch", "--branch", "my other"]
    places = {"my dense": first, "my other": second, "my moe": tmp_path / "again"}
    assert call(*[places.get(word, word) for word in words[1:]], "-q")[0] == 0
    for file in out.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def script(name, *words, status=0):
    """Run a script of conversion/ in a process of its own; returns its standard output and error."""
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "conversion" / name), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == status, result.stderr
    return result.stdout, result.stderr


def test_script_that_upcycles(tmp_path):
    # Few positions, so that the proof is short.
    source = save_dense(tmp_path / "dense", max_position_embeddings=128, tokenizer=True)
    output, _ = script("upcycle.py", source, tmp_path / "moe", "--experts", 2)
    assert "max |Δlogit| " in output
    assert json.loads((tmp_path / "moe" / "certificate.json").read_text())["passed"]
    output, error = script("upcycle.py", source, tmp_path / "moe", status=1)
    assert output == ""
    assert error == f"Error: {tmp_path / 'moe'} exists; choose another name or remove it\n"


def test_script_that_pushes(source, tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[1] / "conversion" / "push_to_hub.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(source), "me/moe", "--private"])
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: "https://huggingface.co/me/moe")
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out == "https://huggingface.co/me/moe\n"
    output, error = script("push_to_hub.py", tmp_path / "nothing", "me/moe", status=1)
    assert output == ""
    assert error == f"Error: {tmp_path / 'nothing'} is not a folder\n"


def test_plan(source, tmp_path):
    status, output, _ = call("plan", source, "--experts", 4)
    assert status == 0
    assert "cache bytes a token" in output
    status, output, _ = call("plan", source, "--experts", 4, "--json")
    assert status == 0
    planned = json.loads(output)["target"]
    call("upcycle", source, tmp_path / "moe", "--experts", 4, "-q")
    assert planned["bytes"] == sum(file.stat().st_size for file in (tmp_path / "moe").glob("*.safetensors"))


def test_a_smaller_cache(source, tmp_path):
    """What the plan says of it, and what it cost; both say more than that it was done."""
    choices = ["--attention", "compress", "--experts", 1, "--calibration-tokens", 256]
    status, output, _ = call("plan", source, *choices, "--max-kl", 0.1)
    assert status == 0
    assert re.search(r"reading \d+ tokens of calibration text takes [\d.]+ [kM]B of memory", " ".join(output.split()))
    assert "How much smaller the cache may be is found on the text" in output
    status, output, _ = call("upcycle", source, tmp_path / "half", *choices, "--cache-ratio", 0.5, "-q")
    assert status == 0
    assert re.match(r"50\.0% of the source's cache costs, on \d+ tokens, KL 0\.\d{4} nats; same most likely", output)
    status, output, _ = call("verify", source, tmp_path / "half", "-q", "--tokens", 60, "--new-tokens", 4)
    assert status == 0
    assert "half: passed; not exact, and this is what it costs:" in output


def test_export_and_import(source, tmp_path):
    call("upcycle", source, tmp_path / "moe", "--experts", 2, "-q")
    assert call("export", tmp_path / "moe", tmp_path / "mixtral", "--to", "mixtral", "-q")[0] == 0
    assert call("import", tmp_path / "mixtral", tmp_path / "back", "-q")[0] == 0
    status, _, error = call("export", tmp_path / "moe", tmp_path / "out", "--to", "qwen3_moe", "-q")
    assert status == 1
    assert "always has, and this model has not: norms a query and key head" in error
    status, output, _ = call("export", "--help")
    assert "grouped-query attention: mixtral needed, qwen3_moe needed" in " ".join(output.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["upcycle", "SOURCE", "OUT", "--experts", "2", "--top-k", "3"], "top_k=3 is above experts=2"),
        (["plan", "SOURCE", "--experts", "2", "--top-k", "3"], "top_k=3 is above experts=2"),
        (["plan", "nobody/nothing"], "the Hub cannot be reached"),
        (["upcycle", "SOURCE", "SOURCE"], "exists; choose another name or remove it"),
        (["upcycle", "nobody/nothing", "OUT"], "the Hub cannot be reached"),
        (["upcycle", "EMPTY", "OUT"], "holds no config.json"),
        (["upcycle", "SOURCE", "OUT", "--dense-layers", "one"], "--dense-layers='one' is not a list such as 0,1,5-7"),
        (["upcycle", "SOURCE", "OUT", "--dense-layers", "2-1"], "--dense-layers='2-1' has the empty range 2-1"),
        (["plan", "SOURCE", "--experts", "1", "--top-k", "5"], "top_k=5 is above experts=1"),
        (["plan", "SOURCE", "--mode", "noise", "--noise-std", "nan"], "noise_std=nan must be a number"),
        (["verify", "SOURCE", "SOURCE"], "holds no provenance.json"),
        (["verify", "SOURCE", "EMPTY", "--text", "nothing.txt"], "nothing.txt"),
        (["push", "EMPTY", "me/moe"], "holds no config.json"),
        (["tune"], "nothing to tune for: name a --model or a --shape"),
        (["tune", "--shape", "64,64,4"], "--shape='64,64,4' is not four whole numbers"),
        (["tune", "--shape", "64,64,4,8"], "--shape='64,64,4,8' has 8 experts a token of 4"),
        (["tune", "--shape", "64,64,8,2"], "tuning needs a GPU"),
        (["tune", "--model", "SOURCE"], "a 'llama' model has no n_routed_experts, so no expert layer to tune"),
        (["tune", "--model", "EMPTY"], "holds no config.json"),
    ],
)
def test_bad_input_is_one_line(source, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    places = {"SOURCE": source, "OUT": tmp_path / "moe", "EMPTY": tmp_path / "empty"}
    status, output, error = call(*[places.get(word, word) for word in words])
    assert status == 1
    assert output == ""
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "empty"]


def test_tune_for_a_model_and_a_shape(tmp_path, monkeypatch):
    """A GPU that answers by arithmetic: the narrowest tile is the fastest."""
    from hf_moe.kernels import tuning

    tiny_model("gqa").save_pretrained(tmp_path / "moe")
    table = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("HF_MOE_CACHE", str(table.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    asked = []
    monkeypatch.setattr(tuning, "_step", lambda *args: asked.append(args[:5]))
    monkeypatch.setattr(tuning, "_time", lambda step, tables, op, rows, tile: tile.n + tile.stages + 10 * tile.per_sm)
    words = ["tune", "--model", tmp_path / "moe", "--shape", "2048,768,128,8", "--tokens", 128, "--tokens", 4096]
    status, output, _ = call(*words)
    assert status == 0
    assert f"{table} is written" in output
    config = tiny_model("gqa").config
    sizes = (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok)
    layers = ((2048, 768, 128, 8), sizes)
    assert asked == [(tokens, *layer) for layer in layers for tokens in (128, 4096)]
    saved = json.loads(table.read_text())["A GPU"]
    assert set(saved) == set(tuning.HOPPER)
    assert set(saved["down"]) == {str(tokens * layer[3] // layer[2]) for layer in layers for tokens in (128, 4096)}


@pytest.mark.parametrize("words", [["--tokens", "1"], ["--new-tokens", "0"], ["--tolerance", "-1"]])
def test_numbers_out_of_range_are_named(source, tmp_path, words):
    status, _, error = call("verify", source, tmp_path, *words)
    assert status == 2
    assert f"Invalid value for '{words[0]}'" in error


def test_interrupt_from_the_keyboard(source, tmp_path):
    # Slowed down, so that Ctrl-C falls into the writing.
    script = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
from hf_moe.upcycling import stream
produce = stream.produce
def slow(*arguments):
    for produced in produce(*arguments):
        time.sleep(0.05)
        yield produced
stream.produce = slow
from hf_moe_command import main
sys.argv = ["hf-moe", "upcycle", {str(source)!r}, {str(tmp_path / "moe")!r}, "-q"]
main()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".moe.partial" / "journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "run the same command again to go on from there" in error
    assert "Traceback" not in error
    assert not (tmp_path / "moe").exists()
    assert call("upcycle", source, tmp_path / "moe", "-q")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
