"""`transformers serve` answers with `generate`'s tokens once it knows the class; else it refuses by name."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "upcycling"))
from dense import byte_tokenizer

MISSING = [name for name in ("fastapi", "uvicorn", "openai", "starlette") if importlib.util.find_spec(name) is None]
# The server looks the class up by its name among those of Transformers, with remote code too.
KNOWN = "import hf_moe, transformers; transformers.HfMoeForCausalLM = hf_moe.HfMoeForCausalLM"
MAIN = "from transformers.cli.transformers import main; main()"
TEXT = "Once upon a time"


def ask(port: int, model: str, stream: bool) -> str:
    """The answer's text."""
    body = {"model": model, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 12, "temperature": 0}
    body["stream"] = stream
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            if not stream:
                return json.load(response)["choices"][0]["message"]["content"]
            events = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: {")]
            return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}: {error.read().decode()}")


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no server: {log.read_text()}")


def command(folder: Path, port: int, before: str, *options: str) -> list[str]:
    """`transformers serve` after some Python."""
    serve = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    return [sys.executable, "-c", f"{before}\n{MAIN}", *serve, *options]


@pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] is not installed: no {', '.join(MISSING)}")
@pytest.mark.parametrize("options", [[], ["--continuous-batching", "--cb-num-blocks", "16", "--cb-block-size", "16"]])
@torch.no_grad()
def test_answers_are_those_of_generate(options, tmp_path):
    tokenizer, model = byte_tokenizer(), tiny_model("deepseek_v3", vocab_size=258)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command(folder, port, KNOWN, *options), env=environment, cwd=tmp_path, stdout=output, stderr=output
        )
        try:
            wait_for(port, server, log)
            for stream in (False, True, False):
                assert ask(port, str(folder), stream) == expected, log.read_text()
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] is not installed: no {', '.join(MISSING)}")
def test_alone_it_refuses_and_names_the_class(tmp_path):
    tiny_model("deepseek_v3", vocab_size=258).save_pretrained(tmp_path / "checkpoint")
    byte_tokenizer().save_pretrained(tmp_path / "checkpoint")
    alone = command(tmp_path / "checkpoint", 0, "", "--trust-remote-code")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(alone, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "module transformers has no attribute HfMoeForCausalLM" in done.stderr
