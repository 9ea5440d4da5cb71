"""A conversion's compressed attention: learnt from its text once, written beside the weights.

`calibration-attention.safetensors` holds the projections of every layer in float32, `ledger.json` their sizes and what
they cost. Both are there or neither; what they say is all that the plan and `verify` need.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from .budget import Candidate, allocate, uniform
from .compression import Built, Survey, Text, build, survey
from .factors import WITHOUT_BIAS
from .families import family_of
from .layerwise import DenseLayers
from .ledger import LEDGER_NAME, write_ledger
from .options import Options
from .plan import shard_header
from .progress import step_bar
from .source_attention import SourceAttention
from .sources import Source
from .widths import Limits, Width, attention_tensors, limits_of

ATTENTION_NAME = "calibration-attention.safetensors"
# Tries to meet a KL.
_TRIES = 6


def learn_attention(
    source: Source, options: Options, fields: dict[str, Any], text: Text, folder: Path, progress: bool
) -> None:
    """Write both files into the folder, unless an interrupted run has.

    Args:
        fields: of the exact target's configuration.
    Cost: see `demand`; in fp32, on a GPU where there is one.
    """
    # Of a run that was killed.
    for left in folder.glob(f"{_MOMENTS}*"):
        shutil.rmtree(left)
    if (folder / LEDGER_NAME).is_file() and (folder / ATTENTION_NAME).is_file():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = family_of(source.config)
    limits = limits_of(fields, family.model_type)
    multiplier = source.config.get(family.residual_multiplier, 1.0) if family.residual_multiplier else 1.0

    def opened() -> SourceAttention:
        return SourceAttention(DenseLayers(source, device), family, fields, limits, multiplier)

    pairs = options.rope_dim // 2 if options.rope_dim is not None and limits.keys else None
    with tempfile.TemporaryDirectory(dir=folder, prefix=_MOMENTS) as moments:
        with step_bar("measuring the attention", limits.layers, progress) as advance:
            numbers = min(_share(options, limits), _PROBED) * limits.numbers
            found = survey(opened(), text, numbers, options.seed, Path(moments), advance, pairs=pairs)

        def made(sizes: list[Candidate]) -> Built:
            writer = AttentionWriter(folder / f".{ATTENTION_NAME}", fields, sizes, multiplier)
            with writer, step_bar("compressing the attention", limits.layers, progress) as advance:
                return build(opened(), found, sizes, text, writer.keep, advance, options.seed)

        built = _within(found, limits, options, made) if options.max_kl else None
        built = built or made(choose(found, limits, options))
    os.replace(folder / f".{ATTENTION_NAME}", folder / ATTENTION_NAME)
    about = {
        "cache_numbers": sum(row["cache_numbers"] for row in built.layers),
        "cache_numbers_source": limits.layers * limits.numbers,
        "tokens_learnt": text.ids[text.learnt].numel(),
        "tokens_measured": text.ids[text.measured].numel(),
        "curve": _curve(found, limits, options.uniform),
    }
    write_ledger(folder / f".{LEDGER_NAME}", built.layers, built.model, about)
    os.replace(folder / f".{LEDGER_NAME}", folder / LEDGER_NAME)


# Folder of the layers' moments while they are needed.
_MOMENTS = ".moments"
# Shares of the cache at which the ledger says what they would cost.
_SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Share of the cache above which a layer alone loses nothing that could be measured.
_PROBED = 0.75


def _share(options: Options, limits: Limits) -> float:
    """Share of the source's cache at which layers are probed."""
    if options.kv_rank is not None and options.rope_dim is not None:
        return (options.kv_rank + (limits.fixed or options.rope_dim)) / limits.numbers
    return options.cache_ratio or 0.5


def choose(found: Survey, limits: Limits, options: Options) -> list[Candidate]:
    """The layers' sizes by ratio or by ranks."""
    if options.kv_rank is not None and options.rope_dim is not None:
        pairs = options.rope_dim // 2 if limits.keys else 0
        return [next(c for c in layer if (c.pairs, c.latent) == (pairs, options.kv_rank)) for layer in found.candidates]
    assert options.cache_ratio is not None
    if options.uniform:
        return uniform(found.candidates, int(options.cache_ratio * limits.numbers))
    return allocate(found.candidates, int(options.cache_ratio * limits.numbers * limits.layers))


def _within(found: Survey, limits: Limits, options: Options, made: Any) -> Built:
    """The smallest cache whose measured KL is within `max_kl`, by secant steps on what is predicted; exact if none is.

    Raises:
        ValueError: the queries' bottleneck alone costs more.
    """
    assert options.max_kl is not None
    most, same = options.max_kl, options.uniform
    full = limits.numbers * (1 if same else limits.layers)
    low, high, goal, best = 0, full, most, None
    for _ in range(_TRIES):
        total = _smallest(found, limits, goal, same, full)
        if best is not None and not low < total < high:
            break
        built = made(_sizes(found, total, same))
        if (kl := built.model["kl"]) <= most:
            high, best = total, total
            if kl > 0.8 * most:
                return built
        else:
            low = total
        goal *= most / max(kl, 0.1 * most)
    built = made(_sizes(found, full if best is None else best, same))
    if options.query_rank is not None and (kl := built.model["kl"]) > most:
        raise ValueError(f"query_rank={options.query_rank} alone costs a KL of {kl:.3g}, above max_kl={most}")
    return built


def _curve(found: Survey, limits: Limits, same: bool) -> list[dict[str, float]]:
    """What other sizes of the whole cache would cost, by the same prediction by which the layers' were chosen."""
    points = []
    for share in _SHARES:
        numbers = int(share * limits.numbers)
        if numbers >= limits.least:
            sizes = _sizes(found, numbers * (1 if same else limits.layers), same)
            spent, damage = sum(size.numbers for size in sizes), sum(size.damage for size in sizes)
            points.append({"cache_numbers": spent, "predicted_kl": damage})
    return points


def _sizes(found: Survey, total: int, same: bool) -> list[Candidate]:
    return uniform(found.candidates, total) if same else allocate(found.candidates, total)


def _smallest(found: Survey, limits: Limits, goal: float, same: bool, full: int) -> int:
    """Fewest numbers whose predicted damage is at most `goal`."""
    low, high = limits.least * (1 if same else limits.layers), full
    while low < high:
        middle = (low + high) // 2
        if sum(size.damage for size in _sizes(found, middle, same)) <= goal:
            high = middle
        else:
            low = middle + 1
    return low


class AttentionWriter:
    """Writes the learnt tensors as they come, one layer in memory."""

    def __init__(self, path: Path, fields: dict[str, Any], sizes: list[Candidate], multiplier: float):
        self.path, self.multiplier = path, multiplier
        keys = sizes[0].pairs > 0
        self.layers = [
            attention_tensors(fields, Width(size.latent, (0,) * size.pairs if keys else None), layer)
            for layer, size in enumerate(sizes)
        ]

    def __enter__(self) -> None:
        self.file = self.path.open("wb")
        self.file.write(shard_header([tensor for layer in self.layers for tensor in layer]))

    def keep(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write a layer's; layers come in order."""
        for tensor in self.layers[layer]:
            module, _, kind = tensor.name.removeprefix(f"layers.{layer}.self_attn.").rpartition(".")
            whole = tensors[module]
            if module not in WITHOUT_BIAS:
                whole = whole[:, -1] if kind == "bias" else whole[:, :-1]
            if module == "o_proj":
                whole = whole * self.multiplier
            assert tuple(whole.shape) == tensor.shape, (tensor, whole.shape)
            self.file.write(whole.float().cpu().contiguous().numpy().tobytes())

    def __exit__(self, *_: Any) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
