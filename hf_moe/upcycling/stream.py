"""Run a plan: read, compute, write one tensor after another, with one layer of the source in memory.

Each shard's header is known from the plan, so a file is written once, from front to back.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import deepseek, experts, latent, router
from .families import Part
from .journal import Journal
from .plan import Plan, TargetTensor
from .progress import Advance
from .sources import Source, torch_dtype

RULES: dict[str, Callable[..., torch.Tensor]] = {**experts.RULES, **latent.RULES, **router.RULES, **deepseek.RULES}
_BLOCK = 16 * 1024 * 1024


@dataclass(frozen=True)
class Produced:
    """A finished tensor: its bytes, their hash, and the hashes of the source's bytes that went in."""

    tensor: TargetTensor
    data: memoryview
    sha256: str
    inputs: tuple[str, ...]


def produce(source: Source, tensors: Iterator[TargetTensor]) -> Iterator[Produced]:
    """Compute tensors in order.

    Raises:
        ValueError: NaN or infinity in the source, or a number too large for the target's type.
    Cost: memory of one layer of the source and two tensors of the target; every source tensor is read once a layer.
    """
    layer: int | None = None
    held: dict[Part, tuple[torch.Tensor, str]] = {}
    for tensor in tensors:
        if tensor.layer != layer:
            held.clear()
            layer = tensor.layer
        yield _produced(source, tensor, held)


def _produced(source: Source, tensor: TargetTensor, held: dict[Part, tuple[torch.Tensor, str]]) -> Produced:
    """One tensor, from what is held and what has to be read. A function, so that its locals end with it."""
    for part in tensor.parts:
        if part not in held:
            held[part] = _read(source, part)
    inputs = [held[part] for part in tensor.parts]
    result = apply_rule(tensor, _means([weight for weight, _ in inputs], tensor.mean_of))
    data = memoryview(as_bytes(result))
    same = tensor.rule == "copy" and result is inputs[0][0]
    sha256 = inputs[0][1] if same else hashlib.sha256(data).hexdigest()
    return Produced(tensor, data, sha256, tuple(digest for _, digest in inputs))


def ahead(stream: Iterator[Produced]) -> Iterator[Produced]:
    """Compute the next tensor in a thread while the present one is written; reading, hashing and writing overlap."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, stream, None)
        while (produced := future.result()) is not None:
            future = pool.submit(next, stream, None)
            yield produced


def apply_rule(tensor: TargetTensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The target tensor from its inputs, in its shape and dtype."""
    arguments: dict[str, Any] = dict(tensor.arguments)
    if tensor.rule.startswith("router_"):
        arguments["shape"] = tensor.shape
    result = RULES[tensor.rule](*inputs, **arguments)
    dtype = torch_dtype(tensor.dtype)
    if result.dtype != dtype:
        result = result.to(dtype)
        if not all_finite(result):
            raise ValueError(f"{tensor.name} has numbers above the largest of {tensor.dtype}; choose another dtype")
    assert result.shape == tensor.shape, (tensor, result.shape)
    return result


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity; both show in the extremes, ten times faster than `isfinite` of all."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def as_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's numbers as a flat array of bytes, little-endian as safetensors wants them."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _means(weights: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    if count == 1:
        return weights
    means = []
    for first in range(0, len(weights), count):
        total = weights[first].double()
        for weight in weights[first + 1 : first + count]:
            total += weight
        means.append((total / count).to(weights[first].dtype))
    return means


def _read(source: Source, part: Part) -> tuple[torch.Tensor, str]:
    weight = source.branches[part.branch].read(part.name, part.start, part.stop)
    if weight.is_floating_point() and not all_finite(weight):
        raise ValueError(f"{part.name} holds NaN or infinity; the source is damaged")
    return weight, hashlib.sha256(as_bytes(weight)).hexdigest()


def write_weights(plan: Plan, source: Source, folder: Path, journal: Journal, advance: Advance) -> None:
    """Write all shards of the plan into `folder`, going on behind what the journal says is finished.

    Args:
        advance: told the number of bytes after each tensor, found or written.
    Raises:
        ValueError: as `produce`. OSError: the disk is full.
    """
    done = _finished(plan, folder, journal, advance)
    journal.rewrite(journal.entries[:done])
    stream = ahead(produce(source, islice(plan.tensors(), done, None)))
    for shard in plan.shards:
        finished = min(done, len(shard.tensors))
        done -= finished
        if finished == len(shard.tensors):
            continue
        path = folder / shard.file
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.write(shard.header)
            file.seek(sum(tensor.nbytes for tensor in shard.tensors[:finished]), os.SEEK_CUR)
            file.truncate()
            for produced in islice(stream, len(shard.tensors) - finished):
                file.write(produced.data)
                file.flush()
                name = produced.tensor.name
                journal.add({"name": name, "sha256": produced.sha256, "inputs": list(produced.inputs)})
                advance(produced.tensor.nbytes)
            os.fsync(file.fileno())
        journal.sync()


def _finished(plan: Plan, folder: Path, journal: Journal, advance: Advance) -> int:
    """How many tensors, from the first on, stand in the files with the bytes that the journal names."""
    done = 0
    entries = journal.entries
    for shard in plan.shards:
        path = folder / shard.file
        if done == len(entries) or not path.exists():
            break
        with path.open("rb") as file:
            if file.read(len(shard.header)) != shard.header:
                break
            for tensor in shard.tensors:
                if done == len(entries) or entries[done]["name"] != tensor.name:
                    return done
                if hash_bytes(file, tensor.nbytes) != entries[done]["sha256"]:
                    return done
                done += 1
                advance(tensor.nbytes)
    return done


def hash_bytes(file: Any, count: int) -> str:
    """SHA-256 of the next `count` bytes of an open file; of fewer when it ends."""
    digest = hashlib.sha256()
    while count:
        block = file.read(min(count, _BLOCK))
        if not block:
            break
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()
