"""What a plan will cost, in numbers that a person can decide by: size, cache, memory, disk, time."""

from math import prod
from typing import Any

from .. import cost
from .demand import demand, disk_bytes
from .families import CALIBRATION
from .headers import FLOAT_TYPES, ITEM_SIZE
from .plan import TENSORS_AHEAD, Plan
from .sources import Source

# Interpreter, torch and buffers, before the first weight; a tokenizer and Transformers' models where text is read.
BASE_MEMORY, READING_MEMORY = 512 * 1024 * 1024, 512 * 1024 * 1024
# Rate of reading, hashing and writing that the time estimate assumes, bytes a second.
RATE = 400_000_000
# Numbers a second that reading calibration text is assumed to compute on a processor.
FLOPS = 40_000_000_000


def summarise(plan: Plan, source: Source) -> dict[str, Any]:
    """Sizes before and after, a row for each layer, and what the conversion itself takes.

    Returns:
        A dictionary of plain numbers. `layers` has for each layer its parameters, active ones, bytes, bytes read and
        the cache bytes a token. `memory_peak_bytes` is one layer of the source and the tensors that wait to be written,
        or what reading calibration text takes; that alone is in `calibration`, None where no text is read.
    """
    count = cost.parameters(plan.config)
    layers = [_layer(plan, source, layer) for layer in range(plan.config["num_hidden_layers"])]
    outside = [t.nbytes + _read_bytes([t], source) for t in plan.tensors() if t.layer is None]
    largest = max(tensor.nbytes for tensor in plan.tensors() if tensor.layer is not None)
    peak = max([row["read_bytes"] + (1 + TENSORS_AHEAD) * largest for row in layers] + outside)
    text = demand(plan, source)
    learning = text.flops / FLOPS if text else 0.0
    heads = source.config["num_key_value_heads"] * 2 * plan.config["v_head_dim"]
    floats = [header for header in source.headers.values() if header.dtype in FLOAT_TYPES]
    source_item = max(ITEM_SIZE[header.dtype] for header in floats)
    return {
        "source": {
            "name": source.title,
            "family": plan.family,
            "parameters": sum(prod(header.shape) for header in source.headers.values()),
            "bytes": source.nbytes,
            "left_out": source.left_out,
            "cache_bytes_per_token": source.config["num_hidden_layers"] * heads * source_item,
        },
        "target": {
            "parameters": count.total,
            "active_parameters": count.active,
            "bytes": plan.nbytes,
            "files": len(plan.shards),
            "cache_bytes_per_token": cost.cache_numbers(plan.config) * plan.item,
            "forward_flops_per_token": cost.forward_flops(plan.config, 0),
        },
        "conversion": {
            "memory_peak_bytes": max(peak, text.memory + READING_MEMORY if text else 0) + BASE_MEMORY,
            "disk_bytes": disk_bytes(plan, source),
            "seconds": round((source.nbytes + plan.nbytes) / RATE + learning, 1),
            "assumed_bytes_per_second": RATE,
            "calibration": text
            and {
                "tokens": text.tokens,
                "memory_bytes": text.memory,
                "disk_bytes": text.kept + text.scratch,
                "seconds": round(learning, 1),
                "assumed_flops_per_second": FLOPS,
            },
        },
        "layers": layers,
    }


def _layer(plan: Plan, source: Source, layer: int) -> dict[str, Any]:
    tensors = [tensor for tensor in plan.tensors() if tensor.layer == layer]
    total = sum(prod(tensor.shape) for tensor in tensors)
    routed = sum(prod(tensor.shape) for tensor in tensors if ".mlp.experts." in tensor.name)
    return {
        "layer": layer,
        "attention": plan.config["layer_types"][layer],
        "mlp": plan.config["mlp_layer_types"][layer],
        "parameters": total,
        "active_parameters": total
        - routed
        + routed * plan.config["num_experts_per_tok"] // plan.config["n_routed_experts"],
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "read_bytes": _read_bytes(tensors, source),
        "cache_bytes_per_token": cost.cache_widths(plan.config)[layer] * plan.item,
    }


def _read_bytes(tensors: list[Any], source: Source) -> int:
    parts = {part for tensor in tensors for part in tensor.parts if part.branch != CALIBRATION}
    size = 0
    for part in parts:
        header = source.headers[part.name]
        rows = header.shape[0] if part.stop is None else part.stop - part.start
        size += header.nbytes * rows // header.shape[0]
    return size
