"""`generate` without launch gaps: a static cache by default, decode steps that replay one captured CUDA graph, and a
host that runs one step ahead of the GPU.

Letters: B batch, L slots of the cache, V vocabulary.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

# A cache by default may take this share of the GPU memory that is free; a larger one grows as it fills instead.
SHARE_OF_FREE_MEMORY = 0.5
# Where there are CUDA graphs.
REPLAYING_DEVICES = ("cuda",)
# A process can capture one graph at a time.
_CAPTURING = threading.Lock()


def is_static(cache: Any) -> bool:
    """Whether every layer keeps its slots at one address and its length in a tensor, so that replays can write both."""
    return _is_in_place(cache) and bool(cache.layers) and all(type(layer) is StaticLayer for layer in cache.layers)


def is_unfilled(cache: Any, layer: int = 0) -> bool:
    """Whether this layer of a cache is static and has seen no token yet."""
    return isinstance(cache, Cache) and _is_static_layer(cache, layer) and not cache.layers[layer].is_initialized


def is_filled(cache: Any, layer: int = 0) -> bool:
    """Whether this layer of a cache is static, its slots exist, and they may be written without the cache's help."""
    return _is_in_place(cache) and _is_static_layer(cache, layer) and cache.layers[layer].is_initialized


def _is_in_place(cache: Any) -> bool:
    """An offloaded cache fetches a layer's slots in `update`."""
    return isinstance(cache, Cache) and not cache.offloading and type(cache).update is Cache.update


def _is_static_layer(cache: Cache, layer: int) -> bool:
    return layer < len(cache.layers) and type(cache.layers[layer]) is StaticLayer


class DecodeStep:
    """The logits (B, V) after one more token a sequence, as one replay of a CUDA graph.

    The first call runs as it is, which also compiles what is compiled lazily; the second is captured; from then on the
    tokens are copied to where the graph reads them. Positions and the slots that may be seen are kept on the device
    and move on with each call. The logits of a call are overwritten by the next.

    Args:
        model: called as model(input_ids, attention_mask, position_ids, past_key_values, use_cache).
        cache: static, and filled with the prompt.
        attention_mask: (B, tokens seen), 0 for padding; None where there is none.
        position: (B, 1), the last token's.
        capture: records a call; `capture_cuda_graph`.
    Cost: one eager step and one capture, which waits for the GPU and empties PyTorch's cache of free memory, for each
        call of `generate`; the graph's memory is that of one eager step.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: Cache,
        attention_mask: torch.Tensor | None,
        position: torch.Tensor,
        capture: Callable[[Callable[[], torch.Tensor], torch.device], tuple[Callable[[], None], torch.Tensor]],
    ):
        self.model, self.cache, self.capture = model, cache, capture
        self.position = position.clone()
        slots = torch.arange(cache.get_max_length(), device=position.device)
        self.visible = (slots < cache.get_seq_length()).repeat(position.shape[0], 1, 1, 1)
        if attention_mask is not None:
            self.visible[..., : attention_mask.shape[1]] &= attention_mask.bool()[:, None, None]
        self.token: torch.Tensor | None = None
        self.replay: Callable[[], None] | None = None
        self.logits: torch.Tensor | None = None

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        if self.token is None:
            self.token = token.unsqueeze(1).clone()
            return self.run()
        self.token.copy_(token.unsqueeze(1))
        if self.replay is None:
            self.replay, self.logits = self.capture(self.run, token.device)
        self.replay()
        assert self.logits is not None
        return self.logits

    def run(self) -> torch.Tensor:
        self.position.add_(1)
        self.visible.index_fill_(-1, self.cache.layers[0].get_seq_length().view(1), True)
        outputs = self.model(
            input_ids=self.token,
            attention_mask={"full_attention": self.visible},
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.logits[:, -1]


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


class CapturedGeneration:
    """`generate` whose greedy and sampling decode steps are replayed on a GPU, with nothing asked for.

    A static cache of the caller's is replayed too. `cache_implementation="dynamic"`, `disable_compile=True` or a
    `compile_config` choose otherwise, as everywhere in Transformers.
    """

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if self._static_by_default(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length):
            generation_config.cache_implementation = "static"
            # Slots that a former call needed would only lengthen this call's mask.
            self._previous_max_cache_length = -1
        arguments = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        return super()._prepare_cache_for_generation(*arguments)  # type: ignore[misc]

    def _static_by_default(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        length: int,
    ) -> bool:
        if model_kwargs.get("past_key_values") is not None or not self._may_replay(generation_config):
            return False
        if generation_config.cache_implementation is not None or generation_config.use_cache is False:
            return False
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return False
        if generation_config.prefill_chunk_size or set(self.config.layer_types) != {"full_attention"}:
            return False
        sequences = batch_size * generation_config.num_return_sequences
        needed = sequences * length * sum(self.config.cache_widths) * self.dtype.itemsize
        return needed < SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(self.device)[0]

    def get_compiled_call(self: Any, compile_config: Any) -> Callable:
        """What a `compile_config` asks for, and the call as it is without one: `_sample` captures what it can."""
        if compile_config is not None:
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        return self.__call__

    def _sample(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As Transformers' own loop, with its steps replayed and their ends read one step late.

        When the last sequence has ended one more step is under way. The cache forgets it; processors, criteria and the
        random generator have seen it.
        """
        arguments = input_ids, logits_processor, stopping_criteria, generation_config
        if synced_gpus or not self._can_capture(generation_config, model_kwargs):
            return super()._sample(*arguments, synced_gpus, streamer, **model_kwargs)  # type: ignore[misc]
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._sample_ahead(*arguments, streamer, **model_kwargs)

    def _sample_ahead(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any,
        **model_kwargs: Any,
    ) -> Any:
        cache = model_kwargs["past_key_values"]
        outputs = self._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        step = self._decode_step(cache, model_kwargs, input_ids)
        # A prompt's logits may be large, and are not wanted any more.
        logits, outputs = outputs.logits[:, -1].clone(), None

        reports = [Report(input_ids.device, input_ids.shape[0]) for _ in range(2)]
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        pad, can_end = generation_config._pad_token_tensor, any(hasattr(c, "eos_token_id") for c in stopping_criteria)
        count, ended = 0, False
        with self._optimize_model_for_decode():
            while True:
                scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
                if generation_config.do_sample:
                    token = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
                else:
                    token = scores.argmax(dim=-1)
                if can_end:
                    token = token * unfinished + pad.to(token.device) * (1 - unfinished)
                input_ids = torch.cat((input_ids, token.unsqueeze(1)), dim=1)
                unfinished = unfinished & ~stopping_criteria(input_ids, None)
                reports[count % 2].write(unfinished, token)
                if count > 0:
                    ended = reports[(count - 1) % 2].read(streamer)
                full = stopping_criteria.max_length is not None and input_ids.shape[1] >= stopping_criteria.max_length
                if ended or full:
                    break
                logits = step(token)
                count += 1
        if ended:
            # The step that was under way when the last sequence ended.
            input_ids = input_ids[:, :-1]
            for layer in cache.layers:
                layer.cumulative_length.sub_(1)
        else:
            reports[count % 2].read(streamer)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)
        return input_ids

    def _may_replay(self: Any, generation_config: GenerationConfig) -> bool:
        """Whether decode steps of this model, asked for so, can be replayed if the cache allows it."""
        if self.device.type not in REPLAYING_DEVICES or torch.distributed.is_initialized():
            return False
        if generation_config.disable_compile or generation_config.compile_config or generation_config.is_assistant:
            return False
        names = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
        if generation_config.return_dict_in_generate and any(getattr(generation_config, name) for name in names):
            return False
        # The loop over experts asks the host which of them have tokens, a dynamic rope how long the text has become.
        if self.config._experts_implementation == "eager" or "dynamic" in self.model.rotary_emb.rope_types:
            return False
        # Transformers cannot prepare flex attention's masks for a static cache.
        if self.config._attn_implementation != "sdpa" or len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            return False
        if getattr(self, "hf_quantizer", None) is not None and not self.hf_quantizer.is_compileable:
            return False
        # Compiled by the user, or fed by somebody else: peft's prompts are inputs that a step would lack.
        if self._compiled_call_impl is not None or hasattr(self.forward, "_torchdynamo_orig_callable"):
            return False
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        return prepare is GenerationMixin.prepare_inputs_for_generation

    def _can_capture(self: Any, generation_config: GenerationConfig, model_kwargs: dict) -> bool:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return False
        return is_static(model_kwargs.get("past_key_values")) and self._may_replay(generation_config)

    def _decode_step(self: Any, cache: Cache, model_kwargs: dict, input_ids: torch.Tensor) -> DecodeStep:
        mask, position = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if position is None:
            position = torch.as_tensor(cache.get_seq_length() - 1, device=input_ids.device).view(1, 1)
        position = position[..., -1:].expand(input_ids.shape[0], 1)
        return DecodeStep(self, cache, mask, position, capture_cuda_graph)

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Transformers', but a prompt that fills a static cache attends to itself: its mask has its own length."""
        if is_static(past_key_values) and set(config.layer_types) == {"full_attention"}:
            assert past_key_values is not None
            if is_unfilled(past_key_values):
                past_key_values = None
        return masking_utils.create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, **kwargs
        )
