"""Static caches as decode steps see them: which are written in place, and windows as rings.

Letters: B batch, L slots of a layer, W slots of a sliding window, C latent width, X width of a token's rotary keys.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer

from .configuration_hf_moe import HfMoeConfig


class ReusableLayer(StaticLayer):
    """A static layer that is as new after `reset`, with its slots where they were: a graph knows their addresses."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.keys is None:
            super().lazy_initialization(key_states, value_states)
        self.is_initialized = True

    def reset(self) -> None:
        super().reset()
        self.is_initialized = False


class Ring:
    """The slots of a window while steps are replayed: token t stands in slot t mod W, whatever it pushes out.

    Transformers' own layer moves the whole window by a slot at each token, and asks the host whether it is full.
    `enter` and `leave` change from its order to this one and back: two copies of the window a call of `generate`.
    """

    def __init__(self, layer: StaticSlidingWindowLayer):
        self.keys: Any = layer.keys
        self.values: Any = layer.values
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=self.keys.device)

    def enter(self, layer: StaticSlidingWindowLayer) -> None:
        self.cumulative_length.fill_(layer.cumulative_length_int)
        self._turn(layer.cumulative_length_int)

    def leave(self, layer: StaticSlidingWindowLayer, seen: int) -> None:
        """Let the layer go on behind this many tokens. The slot of one that was undone is the next that it drops."""
        self._turn(seen, back=True)
        layer.cumulative_length_int = seen
        layer.cumulative_length.fill_(min(seen, layer.max_cache_len))

    def _turn(self, seen: int, back: bool = False) -> None:
        slots = self.keys.shape[2]
        shift = seen % slots if seen > slots else 0
        for tensor in (self.keys, self.values) if shift else ():
            tensor.copy_(tensor.roll(-shift if back else shift, dims=2))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter one token a sequence, (B, 1, 1, C) and (B, 1, 1, X); return all slots."""
        slot = (self.cumulative_length % self.keys.shape[2]).view(1)
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        self.cumulative_length.add_(1)
        return self.keys, self.values


_FULL = StaticLayer, ReusableLayer


def fits_replays(cache: Any, config: HfMoeConfig) -> bool:
    """Whether each layer keeps its slots at one address and its length in a tensor, or in a ring's instead."""
    if not is_static(cache) or len(cache.layers) != config.num_hidden_layers:
        return False
    windows = {layer.max_cache_len for layer in cache.layers if type(layer) is StaticSlidingWindowLayer}
    return len(windows) <= 1 and all(
        (type(layer) is StaticSlidingWindowLayer) == (kind == "sliding_attention")
        for layer, kind in zip(cache.layers, config.layer_types, strict=True)
    )


def is_static(cache: Any) -> bool:
    """Whether all layers are static, and written in place."""
    layers = cache.layers if _is_in_place(cache) else []
    return bool(layers) and all(type(layer) in (*_FULL, StaticSlidingWindowLayer) for layer in layers)


def is_unfilled(cache: Any, layer: int = 0) -> bool:
    """Whether this layer of a cache is static and has seen no token yet."""
    found = _layer_of(cache, layer)
    if type(found) is StaticSlidingWindowLayer:
        return found.cumulative_length_int == 0
    return type(found) in _FULL and not found.is_initialized


def filled_layer(cache: Any, layer: int = 0) -> Any:
    """This layer of a cache, if its slots exist and may be written without the cache's help: static, or a ring."""
    found = _layer_of(cache, layer)
    return found if type(found) is Ring or (type(found) in _FULL and found.is_initialized) else None


def _layer_of(cache: Any, layer: int) -> Any:
    return cache.layers[layer] if _is_in_place(cache) and layer < len(cache.layers) else None


def _is_in_place(cache: Any) -> bool:
    """An offloaded cache fetches a layer's slots in `update`."""
    return isinstance(cache, Cache) and not cache.offloading and type(cache).update is Cache.update


class ReplayedCache(StaticCache):
    """What `generate` makes where steps are replayed.

    Attributes:
        length: tokens that it has room for, whatever its windows hold.
        step: the `DecodeStep` captured with it; a graph can be neither copied nor saved, so a caller never gets it.
        made_for: what the step depends on, see `kept_hf_moe.circumstances`.
    """

    layers: list[Any]

    def __init__(self, config: HfMoeConfig, length: int):
        super().__init__(config=config, max_cache_len=length)
        for index, layer in enumerate(self.layers):
            if type(layer) is StaticLayer:
                self.layers[index] = ReusableLayer(length)
        self.length = length
        self.step: Any = None
        self.made_for: tuple | None = None

    def make_room(self, config: HfMoeConfig, length: int) -> None:
        """Hold up to this many tokens, with those that it has. Its slots move, which no captured step would follow."""
        larger = ReplayedCache(config, length)
        for old, new in zip(self.layers, larger.layers, strict=True):
            if old.keys is None:
                continue
            new.lazy_initialization(old.keys, old.values)
            new.keys[:, :, : old.keys.shape[2]].copy_(old.keys)
            new.values[:, :, : old.values.shape[2]].copy_(old.values)
            new.cumulative_length.copy_(old.cumulative_length)
            new.is_initialized = old.is_initialized
            if type(old) is StaticSlidingWindowLayer:
                new.cumulative_length_int = old.cumulative_length_int
        self.layers, self.length, self.step = larger.layers, length, None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.keys is not None)
