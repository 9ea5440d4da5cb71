"""Tile choices as data: which block shapes each kernel uses on which GPU, and a rule for what no table lists.

Nothing is timed at the first call. `tune` times candidates on this machine and writes a table for later processes.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """The shape of a kernel's work.

    m, n, k: rows, columns and depth of a block. In a weight gradient, m and n are its two sides and k counts rows.
    warps, stages: warps a program, and blocks in flight between memory and the tensor cores.
    group: row tiles that share their columns' weights through L2 before the next ones start.
    per_sm: programs a multiprocessor, each looping over tiles; 0 launches one program a tile.
    flatten: one software pipeline over all tiles of a program, so that a tile's end overlaps the next one's start.
    tma_store: write the result through the bulk copy engine.
    specialized: leave to Hopper's own kernels (`warpgroups`) what they can do; the other fields are for the rest.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 0
    flatten: bool = False
    tma_store: bool = False
    specialized: bool = False


def _wide(stages: int, **more) -> Tile:
    return Tile(128, 256, 64, 8, stages, **more)


# One program a multiprocessor, its tiles in one pipeline, results stored by the copy engine: wins on every large shape.
_FLOW = _wide(4, per_sm=1, flatten=True, tma_store=True)
_SPECIALIZED = _FLOW._replace(specialized=True)
_ROWS = {
    0: Tile(16, 128, 128, 4, 4),
    8: Tile(32, 128, 128, 4, 3),
    32: Tile(64, 256, 64, 4, 4, per_sm=1, flatten=True, tma_store=True),
    96: _FLOW,
}
# Blocks that fit every GPU that Triton knows.
_ANY = {0: Tile(16, 64, 64, 4, 3), 32: Tile(64, 128, 32, 4, 3)}
_SIDES = {0: Tile(128, 128, 64, 4, 3, per_sm=2, flatten=True, tma_store=True), 96: _SPECIALIZED}

# op → (rows an expert, at least) → tile, 16-bit operands on Hopper. Ops that walk a layer's rows share their m.
HOPPER: dict[str, dict[int, Tile]] = {
    "up": _ROWS | {96: _SPECIALIZED},
    "up_inference": _ROWS | {96: _SPECIALIZED},
    "up_rows": _ROWS | {96: _SPECIALIZED, 1024: _wide(3, specialized=True)},
    "down": _ROWS | {96: _SPECIALIZED},
    "gate_gradient": _ROWS | {96: _SPECIALIZED},
    "x_gradient": _ROWS,
    "up_gradient": _SIDES,
    "down_gradient": _SIDES,
}


# Layers of at most this many tokens are products of single rows, when nothing needs a gradient.
SINGLE_ROWS = 2
# Choices summed in a row, at least → tile: 64 elements of 16 bits a thread at a time.
_SINGLE_ROWS = {1: Tile(1, 8, 1024, 4, 1), 4: Tile(1, 32, 256, 4, 1), 8: Tile(1, 64, 256, 8, 1)}
_SMALL_BATCH = Tile(16, 128, 128, 4, 3)


def is_small_batch(n_tokens: int, n_routes: int, n_experts: int) -> bool:
    """Whether a layer without gradients is computed unsorted.

    Each program reads all tokens' choices, and an expert with more than 16 rows reads its weights twice. One H100, µs
    unsorted and sorted: OLMoE 279 and 292 at T = 64, 299 and 295 at 128; Qwen3-30B 416 and 428 at 128, 449 and 434 at
    256.
    """
    return n_tokens <= 128 and n_routes <= 8 * n_experts


@functools.cache
def nvidia_generation(device: torch.device) -> int:
    """The major compute capability of an NVIDIA GPU, 9 for Hopper; 0 elsewhere, for AMD's numbers mean other things."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@functools.lru_cache(maxsize=256)
def single_rows_tile(device: torch.device, dtype: torch.dtype, choices: int) -> Tile:
    """The tile of a product of single rows, of which each sums this many choices."""
    if device.type != "cuda":
        return Tile(1, 64, 64, 4, 1)
    tile = _at(_SINGLE_ROWS, choices)
    return tile._replace(k=tile.k // 2) if dtype == torch.float32 else tile


@functools.lru_cache(maxsize=256)
def small_batch_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile of a layer of few tokens, expert by expert."""
    if device.type != "cuda":
        return Tile(16, 64, 64, 4, 2)
    if dtype == torch.float32 or nvidia_generation(device) != 9:
        return Tile(16, 64, 64, 4, 3)
    return _SMALL_BATCH


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own are slow on the host: its wrapper costs more than a kernel argument."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def user_table() -> Path:
    """Where `tune` writes this user's tiles: $HF_MOE_CACHE/tiles.json, in ~/.cache/hf_moe unless set."""
    return Path(os.environ.get("HF_MOE_CACHE", "~/.cache/hf_moe")).expanduser() / "tiles.json"


@functools.cache
def _tables(device: torch.device) -> dict[str, dict[int, Tile]]:
    """The tiles of a GPU: ours for its generation, and over them what `tune` found on this machine."""
    ours = HOPPER if nvidia_generation(device) == 9 else dict.fromkeys(HOPPER, _ANY)
    path = user_table()
    if not path.is_file():
        return ours
    tuned = json.loads(path.read_text()).get(torch.cuda.get_device_name(device), {})
    return {op: table | {int(rows): Tile(*t) for rows, t in tuned.get(op, {}).items()} for op, table in ours.items()}


@functools.lru_cache(maxsize=1024)
def choose(op: str, device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> Tile:
    """The tile of `op` for a layer whose experts own this many rows on average.

    A row count that no table lists takes the entry below it; float32, and GPUs other than Hopper, take blocks that fit
    any of them.
    """
    if device.type != "cuda":
        return Tile(16, 64, 64, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    return _at(_tables(device)[op], rows_per_expert)


def _at(table, rows: int):
    return table[max(least for least in table if least <= rows)]


# The deepest sums of Hopper's own kernels. They skip the empty half of an expert's last tile, so programs drift apart,
# and what they share must stay in L2: tiles of depth 2048 are 21 MB. Mixtral's down, 14336 deep: 637 TFLOP/s for 754.
SPECIALIZED_DEPTH = 2816


def spreads(width: int, training: bool, specialized: bool = False) -> bool:
    """Whether the first projection reads copied rows (bulk copies) rather than gather its tokens.

    The copy costs time in proportion to the rows, the product gains some in proportion to rows times expert width: 635
    TFLOP/s against 530 when it also stores h, 643 against 597 when it does not (width 768). In Hopper's own kernels
    (specialized) 623 against 579 and 652 against 623.
    """
    return width >= (512 if training and not specialized else 2048)


def candidates(tile: Tile) -> list[Tile]:
    """Tiles near one that is known to work; their height stays, since all kernels of a layer share it."""
    flow = {"per_sm": 1, "flatten": True, "tma_store": True}
    shapes = [(256, 64, 8), (128, 64, 8), (128, 64, 4)] if tile.m >= 64 else [(128, 128, 4), (64, 128, 4), (128, 64, 4)]
    found = [
        tile._replace(
            n=n, k=k, warps=warps, stages=stages, per_sm=0, flatten=False, tma_store=False, specialized=False
        )._replace(**more)
        for n, k, warps in shapes
        for stages in (3, 4)
        for more in ({}, {"tma_store": True}, flow)
    ]
    if tile.m == 128:
        found += [_FLOW, _SPECIALIZED]
    return [tile, *(t for t in dict.fromkeys(found) if t != tile)]


def tune(
    shapes: Iterable[tuple[int, int, int, int]],
    tokens: Iterable[int] = (1024, 8192),
    *,
    dtype: torch.dtype = torch.bfloat16,
    path: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Time tiles for layers of these sizes on this machine's GPU, and save the best for later processes.

    One op after the other, the whole layer is timed forward and backward with each candidate in its place. A candidate
    that does not compile or does not fit is passed over.

    Args:
        shapes: (hidden, expert width, experts, experts a token) of each layer.
        tokens: batch sizes; each fills the entry of its rows an expert.
        path: the table to write, `user_table()` when None. Other entries in it are kept.
        report: called with a line for each choice.
    Returns:
        path.
    Raises:
        ValueError: there is no GPU.
    Cost: about three minutes for each shape and batch size, most of it compilation.
    """
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a GPU, and torch.cuda.is_available() is False")
    path = path or user_table()
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    saved = json.loads(path.read_text()) if path.is_file() else {}
    tables = {op: dict(table) for op, table in _tables(device).items()}
    for D, F, E, K in shapes:
        for T in tokens:
            rows = T * K // E
            step = _step(T, D, F, E, K, dtype, device)
            for op in tables:
                times = {tile: _time(step, tables, op, rows, tile) for tile in candidates(_at(tables[op], rows))}
                best = min(times, key=lambda tile: times[tile])
                tables[op][rows] = best
                saved.setdefault(name, {}).setdefault(op, {})[str(rows)] = list(best)
                report(f"{op} at {rows} rows an expert: {best}, {times[best]:.3f} ms a step")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")
    _machine_tables.cache_clear()
    _use(None)
    return path


def shape_of(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(hidden, expert width, experts, experts a token) of a mixture's configuration, ours or Transformers'.

    Raises:
        ValueError: it has no experts.
    """
    wanted = {
        "hidden_size": ("hidden_size",),
        "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
        "n_routed_experts": ("n_routed_experts", "num_experts", "num_local_experts"),
        "num_experts_per_tok": ("num_experts_per_tok", "moe_topk", "top_k_experts"),
    }
    sizes = []
    for what, names in wanted.items():
        found = [config[name] for name in names if isinstance(config.get(name), int)]
        if not found:
            raise ValueError(f"a {config.get('model_type')!r} model has no {what}, so no expert layer to tune")
        sizes.append(found[0])
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _step(T: int, D: int, F: int, E: int, K: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    from .layer import experts

    sizes = ((T, D), (T, K), (E, 2 * F, D), (E, D, F))
    leaves = [torch.randn(size, device=device, dtype=dtype).mul_(0.05).requires_grad_() for size in sizes]
    index = torch.rand((T, E), device=device).argsort(1)[:, :K].contiguous()
    dout = torch.randn((T, D), device=device, dtype=dtype)
    return lambda: torch.autograd.grad(experts(leaves[0], index, *leaves[1:]), leaves, dout)


def _use(tables: dict[str, dict[int, Tile]] | None) -> None:
    """Make `choose` read these tables; None goes back to the machine's own."""
    from . import layer

    global _tables
    _tables = _machine_tables if tables is None else lambda device: tables  # type: ignore[assignment]
    choose.cache_clear()
    layer.Plan.of.cache_clear()


_machine_tables = _tables


def _time(step, tables, op: str, rows: int, tile: Tile) -> float:
    _use({**tables, op: {**tables[op], rows: tile}})
    try:
        step()
        torch.cuda.synchronize()
    except Exception:  # a tile that does not fit fails in as many ways as there are compilers
        return float("inf")
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
