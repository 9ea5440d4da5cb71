"""A plan says what the conversion will write, from headers alone and without torch."""

import json
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from dense import save_dense
from safetensors.torch import load_file

from hf_moe.upcycling import Options, make_plan, open_source, upcycle
from hf_moe.upcycling.headers import read_header
from hf_moe.upcycling.summary import summarise

SPLIT = {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 6, "top_k": 3}


@pytest.mark.parametrize("choices", [{"experts": 4}, {"experts": 1}, {**SPLIT, "dense_layers": (1,)}])
@pytest.mark.parametrize("name", ["llama_biases", "gemma3", "phi3_partial", "olmo2"])
def test_plan_is_what_is_written(tmp_path, name, choices):
    source = open_source(save_dense(tmp_path / "dense", name))
    plan = make_plan(source, Options(**choices, max_shard_bytes=50_000))
    target = upcycle(tmp_path / "dense", tmp_path / "moe", progress=False, **choices, max_shard_bytes=50_000)
    summary = summarise(plan, source)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) == summary["target"]["files"]
    assert sum(file.stat().st_size for file in files) == summary["target"]["bytes"] == plan.nbytes
    numbers = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert numbers == summary["target"]["parameters"] == plan.parameters
    outside = sum(t.nbytes for t in plan.tensors() if t.layer is None)
    headers = sum(len(shard.header) for shard in plan.shards)
    assert sum(row["bytes"] for row in summary["layers"]) + outside + headers == plan.nbytes
    # Exact attention keeps the cache's size.
    assert summary["target"]["cache_bytes_per_token"] == summary["source"]["cache_bytes_per_token"]


def test_active_parameters(tmp_path):
    source = open_source(save_dense(tmp_path / "dense"))
    dense = summarise(make_plan(source, Options(experts=1)), source)["target"]
    split = summarise(make_plan(source, Options(**SPLIT)), source)["target"]
    # One shared and one copy of each of three shards: the dense model's work, and the router's.
    assert split["active_parameters"] - dense["active_parameters"] == 3 * 6 * 48
    assert split["parameters"] > dense["parameters"]


def test_needs_no_torch(tmp_path):
    """The modules of the plan run where torch cannot be imported at all."""
    source = save_dense(tmp_path / "dense")
    script = f"""
import sys, types, importlib.util
sys.modules["torch"] = None
package = types.ModuleType("hf_moe")
package.__path__ = list(importlib.util.find_spec("hf_moe").submodule_search_locations)
sys.modules["hf_moe"] = package
from hf_moe.upcycling.options import Options
from hf_moe.upcycling.layout import make_plan
from hf_moe.upcycling.sources import open_source
from hf_moe.upcycling.summary import summarise
source = open_source({str(source)!r})
print(summarise(make_plan(source, Options(experts=4)), source)["target"]["parameters"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    opened = open_source(source)
    assert int(result.stdout) == summarise(make_plan(opened, Options(experts=4)), opened)["target"]["parameters"]


def test_hub_repository_by_its_headers(tmp_path, monkeypatch):
    folder = save_dense(tmp_path / "dense")
    local = open_source(folder)
    tensors = {
        name: SimpleNamespace(dtype=h.dtype, shape=list(h.shape), data_offsets=(h.start, h.stop))
        for name, h in read_header(folder / "model.safetensors").items()
    }
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", lambda *_, **__: metadata)
    remote = open_source("owner/name", headers_only=True)
    plans = [make_plan(source, Options(experts=4)) for source in (remote, local)]
    assert list(plans[0].tensors()) == list(plans[1].tensors())
    with pytest.raises(ValueError, match="opened for its headers only"):
        remote.read("model.norm.weight")


def test_summary_is_json(tmp_path):
    source = open_source(save_dense(tmp_path / "dense"))
    assert json.loads(json.dumps(summarise(make_plan(source, Options()), source)))["layers"][2]["mlp"] == "sparse"
