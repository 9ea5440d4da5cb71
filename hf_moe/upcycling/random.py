"""Random streams by name: a tensor's numbers depend on its own seed, not on what was written before it."""

import hashlib

import torch


def generator(seed: str) -> torch.Generator:
    """A stream of its own for each seed."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))


class Draws:
    """Normal numbers drawn one part after another, any of which can be had again: streams are kept, not numbers.

    Parts of a multiple of 16 numbers are those of one draw of all.
    """

    def __init__(self, seed: str):
        self.random = generator(seed)
        self.begin = [self.random.get_state()]

    def draw(self, part: int, shape: torch.Size) -> torch.Tensor:
        """Part by its number; all parts have one shape."""
        for missing in range(len(self.begin) - 1, part):
            self.draw(missing, shape)
        self.random.set_state(self.begin[part])
        numbers = torch.randn(shape, generator=self.random)
        if part + 1 == len(self.begin):
            self.begin.append(self.random.get_state())
        return numbers
