"""Memory and speed of a conversion at scale: `python conversion/benchmark_streaming.py WORK_FOLDER RESULT.json`.

Writes a synthetic Llama-3-8B-shaped folder of bfloat16 shards (16 GB), plans 8 experts from its headers, converts it in
mode split, and copies the same folder file by file with `shutil`, all on the same disk in the same run. Needs twice the
model's size of free space. `--layers` makes it smaller.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SPLIT: dict[str, Any] = {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 3, "top_k": 3}


def write_source(folder: Path, layers: int) -> None:
    """Random weights, a shard for each layer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    hidden, width, keys = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"], 8 * 128
    # One block of random numbers, begun elsewhere for every tensor: drawing 8 billion would take longer than all else.
    block = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    count = 0

    def weight(*shape: int) -> torch.Tensor:
        nonlocal count
        count += 1
        size = torch.Size(shape).numel()
        start = count * 7919 % 4096
        return block[start:].repeat(size // (len(block) - start) + 1)[:size].view(shape)

    index: dict[str, str] = {}
    for number in range(layers + 1):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        if number < layers:
            prefix = f"model.layers.{number}."
            tensors = {
                f"{prefix}self_attn.q_proj.weight": weight(hidden, hidden),
                f"{prefix}self_attn.k_proj.weight": weight(keys, hidden),
                f"{prefix}self_attn.v_proj.weight": weight(keys, hidden),
                f"{prefix}self_attn.o_proj.weight": weight(hidden, hidden),
                f"{prefix}mlp.gate_proj.weight": weight(width, hidden),
                f"{prefix}mlp.up_proj.weight": weight(width, hidden),
                f"{prefix}mlp.down_proj.weight": weight(hidden, width),
                f"{prefix}input_layernorm.weight": weight(hidden),
                f"{prefix}post_attention_layernorm.weight": weight(hidden),
            }
        else:
            tensors = {"model.norm.weight": weight(hidden)}
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = weight(LLAMA_8B["vocab_size"], hidden)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    config = LLAMA_8B | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def drop_from_memory(folder: Path) -> None:
    """Ask the kernel to forget the files, so that every run reads them from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_process(function, *arguments) -> dict:
    """Seconds and peak memory of a function, in a process of its own."""
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(queue, function, arguments))
    process.start()
    result = queue.get()
    process.join()
    return result


def _measured(queue, function, arguments) -> None:
    begin = time.monotonic()
    value = function(*arguments)
    # Not getrusage: a child begins with its parent's maximum there.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    queue.put({"seconds": time.monotonic() - begin, "peak_memory_bytes": peak, "value": value})


def plan(source: Path) -> int:
    """Bytes of the plan for 8 copies of the MLP."""
    from hf_moe.upcycling import Options, make_plan, open_source

    return make_plan(open_source(source), Options(experts=8)).nbytes


def convert(source: Path, target: Path) -> int:
    """Bytes written by the conversion, its start included."""
    from hf_moe.upcycling import upcycle

    upcycle(source, target, **SPLIT)
    return sum(path.stat().st_size for path in target.iterdir())


def copy(source: Path, target: Path) -> int:
    """Bytes written by a plain copy that ends on the disk as the conversion does."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    return sum(path.stat().st_size for path in target.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    source, target = arguments.work / "dense", arguments.work / "target"
    if not source.is_dir():
        write_source(source, arguments.layers)
    size = sum(path.stat().st_size for path in source.iterdir())
    result: dict = {"layers": arguments.layers, "source_bytes": size, "cpus": os.cpu_count()}
    result["rounds"] = arguments.rounds
    result |= {"python": platform.python_version(), "plan_8_experts": in_process(plan, source), "choices": SPLIT}
    # In turn, and the best round of each: what comes second finds memory and disk warmed up by the first.
    for _ in range(arguments.rounds):
        for name, function in (("convert", convert), ("copy", copy)):
            drop_from_memory(source)
            measured = in_process(function, source, target)
            measured["bytes_per_second"] = measured["value"] / measured["seconds"]
            shutil.rmtree(target)
            if name not in result or measured["bytes_per_second"] > result[name]["bytes_per_second"]:
                result[name] = measured
    result["speed_against_copy"] = result["convert"]["bytes_per_second"] / result["copy"]["bytes_per_second"]
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
