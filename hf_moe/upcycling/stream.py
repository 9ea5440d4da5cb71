"""Run a plan: read, compute, write one tensor after another, with one layer of the source in memory.

Each shard's header is known from the plan, so a file is written once, from front to back. One thread reads and
computes, some hash, one writes and one waits for the disk: hashing takes most of the time, and needs no interpreter.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import deepseek, experts, latent, router
from .families import Part
from .journal import Journal
from .plan import TENSORS_AHEAD, Plan, Shard, TargetTensor
from .progress import Advance
from .sources import Source, torch_dtype

RULES: dict[str, Callable[..., torch.Tensor]] = {**experts.RULES, **latent.RULES, **router.RULES, **deepseek.RULES}
_BLOCK = 16 * 1024 * 1024
_HASHERS = min(4, os.cpu_count() or 1)

Held = dict[Part, tuple[torch.Tensor, "Future[str]"]]


@dataclass(frozen=True)
class Produced:
    """A finished tensor: its bytes, and, when they are ready, their hash and those of the source's bytes that went in.

    The inputs' raise ValueError when the source holds NaN or infinity.
    """

    tensor: TargetTensor
    data: memoryview
    sha256: "Future[str]"
    inputs: tuple["Future[str]", ...]

    def hashes(self) -> tuple[str, list[str]]:
        """Wait for both."""
        inputs = [digest.result() for digest in self.inputs]
        return self.sha256.result(), inputs


def produce(source: Source, tensors: Iterator[TargetTensor]) -> Iterator[Produced]:
    """Compute tensors in order.

    Raises:
        ValueError: a number too large for the target's type.
    Cost: memory of one layer of the source and of each tensor until it is let go; every source tensor is read once a
        layer.
    """
    layer: int | None = None
    held: Held = {}
    with ThreadPoolExecutor(_HASHERS) as hashers:
        for tensor in tensors:
            if tensor.layer != layer:
                held.clear()
                layer = tensor.layer
            yield _produced(source, tensor, held, hashers)


def _produced(source: Source, tensor: TargetTensor, held: Held, hashers: Executor) -> Produced:
    """One tensor, from what is held and what has to be read. A function, so that its locals end with it."""
    for part in tensor.parts:
        if part not in held:
            weight = source.branches[part.branch].read(part.name, part.start, part.stop)
            held[part] = weight, hashers.submit(_checked_digest, part.name, [weight])
    weights, digests = zip(*(held[part] for part in tensor.parts), strict=True) if tensor.parts else ((), ())
    try:
        result = apply_rule(tensor, _means(list(weights), tensor.mean_of))
    except ValueError:
        for digest in digests:
            # What is wrong with the source says more than what came of it.
            digest.result()
        raise
    data = memoryview(as_bytes(result))
    same = tensor.rule == "copy" and result is weights[0]
    return Produced(tensor, data, digests[0] if same else hashers.submit(_digest, [data]), digests)


def _checked_digest(name: str, box: list[torch.Tensor]) -> str:
    """SHA-256 of the tensor in the box, which is emptied: an executor would hold an argument for longer."""
    weight = box.pop()
    check_finite(name, weight)
    return hashlib.sha256(as_bytes(weight)).hexdigest()


def _digest(box: list[memoryview]) -> str:
    return hashlib.sha256(box.pop()).hexdigest()


def ahead(stream: Iterator[Produced]) -> Iterator[Produced]:
    """Compute the next tensors in a thread while the present one is written."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, stream, None) for _ in range(TENSORS_AHEAD))
        while (produced := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, stream, None))
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


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse a tensor of a source with NaN or infinity.

    Raises:
        ValueError.
    """
    if weight.is_floating_point() and not all_finite(weight):
        raise ValueError(f"{name} holds NaN or infinity; the source is damaged")


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


def write_weights(plan: Plan, source: Source, folder: Path, journal: Journal, advance: Advance) -> None:
    """Write all shards of the plan into `folder`, going on behind what the journal says is finished.

    Args:
        advance: told the number of bytes after each tensor, found or written.
    Raises:
        ValueError: as `produce`, or NaN or infinity in the source. OSError: the disk is full.
    """
    done = _finished(plan, folder, journal, advance)
    journal.keep(done)
    stream = ahead(produce(source, islice(plan.tensors(), done, None)))
    with ThreadPoolExecutor(1) as disk:
        synced: list[Future[None]] = []
        for shard in plan.shards:
            finished = min(done, len(shard.tensors))
            done -= finished
            if finished == len(shard.tensors):
                continue
            _write_shard(shard, folder / shard.file, finished, stream, journal, advance)
            synced.append(disk.submit(_sync, folder / shard.file, journal))
            # One file may be on its way to the disk while the next is written; more would pile up in memory.
            for earlier in synced[:-1]:
                earlier.result()
        for each in synced:
            each.result()


def _write_shard(
    shard: Shard, path: Path, finished: int, stream: Iterator[Produced], journal: Journal, advance: Advance
) -> None:
    """Write a file from its tensor `finished` on."""
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.write(shard.header)
        file.seek(sum(tensor.nbytes for tensor in shard.tensors[:finished]), os.SEEK_CUR)
        file.truncate()
        for produced in islice(stream, len(shard.tensors) - finished):
            # First the hashes: they have brought into memory what is written then.
            sha256, inputs = produced.hashes()
            _write_all(file, produced.data)
            journal.add({"name": produced.tensor.name, "sha256": sha256, "inputs": inputs})
            advance(produced.tensor.nbytes)


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        # One call writes 2 GiB at most.
        data = data[file.write(data) :]


def _sync(path: Path, journal: Journal) -> None:
    """Make a file and the record of it survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # Nobody reads it again soon: the next file takes its memory, instead of everybody else's.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
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
