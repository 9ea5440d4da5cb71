"""One decode step as one replay of a CUDA graph, and what it found as the host reads it, a step late.

Letters: B batch, L slots of a layer, V vocabulary.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticSlidingWindowLayer

from .slots_hf_moe import Ring

# A process can capture one graph at a time.
_CAPTURING = threading.Lock()


class DecodeStep:
    """The logits (B, V) after one more token a sequence, as one replay of a CUDA graph.

    The first call runs as it is, which also compiles what is compiled lazily; the second is captured; from then on the
    tokens are copied to where the graph reads them. Positions, and the slots that may be seen, are kept on the device
    and move on with each call. The logits of a call are overwritten by the next.

    It holds neither the model nor the cache, and serves them in later calls of `generate` too.

    Args:
        cache: static, and filled with a prompt.
        layer_types: of each of its layers.
        batch_size: B.
        capture: records a call; `capture_cuda_graph`.
    Cost: one eager step and one capture, which waits for the GPU and empties PyTorch's cache of free memory; as much
        memory as an eager step takes.
    """

    def __init__(
        self,
        cache: Cache,
        layer_types: list[str],
        batch_size: int,
        capture: Callable[[Callable[[], torch.Tensor], torch.device], tuple[Callable[[], None], torch.Tensor]],
    ):
        self.capture = capture
        self.device = cache.layers[0].keys.device
        self.token, self.position = (torch.zeros((batch_size, 1), dtype=torch.long, device=self.device) for _ in "tp")
        self.seen = torch.zeros((), dtype=torch.long, device=self.device)
        slots = {kind: layer.keys.shape[2] for kind, layer in zip(layer_types, cache.layers, strict=True)}
        self.visible = {
            kind: torch.zeros((batch_size, 1, 1, count), dtype=torch.bool, device=self.device)
            for kind, count in slots.items()
        }
        self.rings = {
            index: Ring(layer) for index, layer in enumerate(cache.layers) if type(layer) is StaticSlidingWindowLayer
        }
        self.steps = 0
        self.has_run = False
        self.replay: Callable[[], None] | None = None
        self.logits: torch.Tensor | None = None

    @contextmanager
    def behind(self, cache: Cache, attention_mask: torch.Tensor | None, position: torch.Tensor) -> Iterator[None]:
        """While the cache goes on by this step's calls.

        Args:
            attention_mask: (B, tokens seen), 0 for padding; None where there is none.
            position: (B, 1), the last token's.
        """
        self.steps = 0
        self.position.copy_(position)
        self.seen.copy_(torch.as_tensor(cache.get_seq_length()))
        for visible in self.visible.values():
            slots = visible.shape[-1]
            # Of each slot the last token t with t mod slots = slot; below 0 where it is not written yet.
            token = self.seen - 1 - (self.seen - 1 - torch.arange(slots, device=self.device)) % slots
            visible.copy_(token >= 0)
            if attention_mask is not None:
                last = attention_mask.shape[1] - 1
                visible &= attention_mask.to(self.device).bool()[:, token.clamp(0, last)][:, None, None]
        layers = dict(enumerate(cache.layers))
        for index, ring in self.rings.items():
            ring.enter(layers[index])
            cache.layers[index] = ring  # type: ignore[call-overload]
        try:
            yield
        finally:
            for index, ring in self.rings.items():
                cache.layers[index] = layers[index]
                ring.leave(layers[index], layers[index].cumulative_length_int + self.steps)

    def __call__(self, model: nn.Module, cache: Cache, token: torch.Tensor) -> torch.Tensor:
        """Feed tokens (B).

        Args:
            model: called as model(input_ids, attention_mask, position_ids, past_key_values, use_cache).
        """
        self.token.copy_(token.unsqueeze(1))
        self.steps += 1
        if not self.has_run:
            self.has_run = True
            return self.run(model, cache)
        if self.replay is None:
            self.replay, self.logits = self.capture(lambda: self.run(model, cache), self.device)
        self.replay()
        assert self.logits is not None
        return self.logits

    def run(self, model: nn.Module, cache: Cache) -> torch.Tensor:
        self.position.add_(1)
        for visible in self.visible.values():
            visible.index_fill_(-1, (self.seen % visible.shape[-1]).view(1), True)
        self.seen.add_(1)
        outputs = model(
            input_ids=self.token,
            attention_mask=dict(self.visible),
            position_ids=self.position,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.logits[:, -1]

    def undo(self, cache: Cache) -> None:
        """Make the cache forget the last token."""
        self.steps -= 1
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)  # type: ignore[union-attr]


def capture_cuda_graph(
    call: Callable[[], torch.Tensor], device: torch.device
) -> tuple[Callable[[], None], torch.Tensor]:
    """Record what `call` launches on this device, without running it. Returns what replays it, and where its result
    will be. Other threads may go on allocating; only one captures at a time.
    """
    graph = torch.cuda.CUDAGraph()
    options = {"stream": _capture_stream(device), "capture_error_mode": "thread_local"}
    with _CAPTURING, torch.no_grad(), torch.cuda.graph(graph, **options):
        output = call()
    return graph.replay, output


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """One for all captures: cuBLAS keeps 32 MiB for each stream that it has ever seen."""
    return torch.cuda.Stream(device)


class Report:
    """What a step found, read by the host one step later, so that it never waits for the step that is under way.

    Source: the idea of Transformers' `DeferredStopCheck`, which takes it for other devices.
    """

    def __init__(self, device: torch.device, batch_size: int):
        pinned = device.type == "cuda"
        self.finished = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        self.tokens = torch.zeros(batch_size, dtype=torch.long, pin_memory=pinned)
        self.written = torch.cuda.Event() if pinned else None

    def write(self, unfinished: torch.Tensor, tokens: torch.Tensor) -> None:
        self.finished.copy_(unfinished.max() == 0, non_blocking=True)
        self.tokens.copy_(tokens, non_blocking=True)
        if self.written is not None:
            self.written.record()

    def read(self, streamer: Any) -> bool:
        """Hand the tokens to the streamer; return whether every sequence had ended."""
        if self.written is not None:
            self.written.synchronize()
        if streamer is not None:
            streamer.put(self.tokens.clone())
        return bool(self.finished)
