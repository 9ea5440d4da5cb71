"""A cache that grows in place, where steps are not replayed.

Letters: B batch, L tokens held, S tokens to come, X numbers a token.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def rounded(length: int) -> int:
    """A cache's length with room for the next, longer text: at most an eighth more, or 256 tokens."""
    step = max(256, 1 << max(0, length.bit_length() - 4))
    return (length + step - 1) // step * step


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room behind its tokens: Transformers' own copies all of them for each one that comes.

    Where a tracer or a gradient needs new tensors, it does the same.
    """

    keys: Any
    values: Any
    key_room: torch.Tensor | None = None
    value_room: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = _append(self.keys, self.key_room, key_states)
        self.values, self.value_room = _append(self.values, self.value_room, value_states)
        return self.keys, self.values


def _append(held: torch.Tensor, room: torch.Tensor | None, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, 1, L + S, X), and the room that they stand in: the same one, if `held` (B, 1, L, X) begins it."""
    start = held.shape[2] if held.numel() else 0
    end = start + new.shape[2]
    if room is None or not (
        held.data_ptr() == room.data_ptr()
        and held.shape[:2] == new.shape[:2] == room.shape[:2]
        and held.dtype == new.dtype
        and end <= room.shape[2]
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    ):
        room = new.new_empty((*new.shape[:2], rounded(end), new.shape[3]))
        if start:
            room[:, :, :start] = held
    room[:, :, start:end] = new
    return room[:, :, :end], room


def grow_in_place(cache: Cache | None) -> None:
    """Give each layer of an empty dynamic cache room to grow, but for windows, which stay short."""
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
