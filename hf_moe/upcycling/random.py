"""Random streams by name: a tensor's numbers depend on its own seed, not on what was written before it."""

import hashlib

import torch


def generator(seed: str) -> torch.Generator:
    """A stream of its own for each seed."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))
