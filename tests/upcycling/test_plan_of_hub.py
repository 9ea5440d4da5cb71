"""`hf-moe plan` of a Hub id, over HTTP from a server here: what is asked for, and that no weights are."""

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from dense import save_dense
from safetensors.torch import load_file, save_file
from test_packed import pack_folder

from hf_moe.upcycling import Options, make_plan, open_source
from hf_moe.upcycling.summary import summarise

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves the files of `folder` as the repository owner/name, ranges included."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match = re.fullmatch(r"/owner/name/resolve/[\w.]+/([\w.-]+)", self.path)
        path = self.server.folder / match[1] if match else None
        if path is None or not path.is_file():
            self.send_response(404)
            # The Hub's way of saying that the repository is there and the file is not.
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, whole = path.read_bytes(), path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            data = data[int(span[1]) : int(span[2]) + 1]
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{path.name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(data) - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
            self.server.sent[path.name] = self.server.sent.get(path.name, 0) + len(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.sent = tmp_path / "dense", {}
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def plan(hub, tmp_path, source):
    names = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "HF_HUB_OFFLINE"} | names
    command = [sys.executable, "-c", "import hf_moe_command as c; c.main()", "plan", source, "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("shards", ["1GB", "2MB"])
def test_headers_are_fetched_and_weights_are_not(hub, tmp_path, shards):
    sizes = {"vocab_size": 20_000, "hidden_size": 64, "head_dim": 16}
    folder = save_dense(tmp_path / "dense", max_shard_size=shards, **sizes)
    result = plan(hub, tmp_path, "owner/name")
    assert result.returncode == 0, result.stderr
    opened = open_source(folder)
    remote, local = json.loads(result.stdout), summarise(make_plan(opened, Options()), opened)
    assert remote["source"].pop("name") == "owner/name"
    assert local["source"].pop("name") == "dense"
    assert remote == local
    assert [row["layer"] for row in remote["layers"]] == [0, 1, 2]
    assert remote["conversion"]["seconds"] > 0
    weights = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert len(weights) == (1 if shards == "1GB" else 3)
    # Of each file its beginning, which is longer than the header.
    assert all(0 < hub.sent[name] <= 110_000 < size for name, size in weights.items())


def test_biases_that_a_packer_added_are_left_out(hub, tmp_path):
    folder = save_dense(tmp_path / "dense")
    pack_folder(folder, "gptq")
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("scales")]:
        stored[name.replace("scales", "bias")] = torch.zeros(stored[name].shape[1])
    save_file(stored, folder / "model.safetensors")
    result = plan(hub, tmp_path, "owner/name")
    assert result.returncode == 0, result.stderr
    opened = open_source(folder)
    assert json.loads(result.stdout)["layers"] == summarise(make_plan(opened, Options()), opened)["layers"]

    # One that adds something is no packer's.
    stored["model.layers.0.mlp.up_proj.bias"][-1] = 1.0
    save_file(stored, folder / "model.safetensors")
    result = plan(hub, tmp_path, "owner/name")
    assert result.returncode == 1
    assert result.stderr == (
        "Error: model.layers.0.mlp.up_proj.bias is no tensor of LlamaForCausalLM, and would be lost\n"
    )


def test_repository_without_a_configuration_is_one_sentence(hub, tmp_path):
    (tmp_path / "dense").mkdir()
    result = plan(hub, tmp_path, "owner/name")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the Hub refused 'owner/name'")
    assert result.stderr.count("\n") == 1
