"""`generate` without launch gaps: a static cache by default, decode steps that replay one captured CUDA graph, and a
host that runs one step ahead of the GPU.

Letters: B batch, L slots of the cache, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import masking_utils
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from .growing_hf_moe import grow_in_place, rounded
from .kept_hf_moe import circumstances, forget, keep, take
from .replay_hf_moe import DecodeStep, Report, capture_cuda_graph
from .slots_hf_moe import ReplayedCache, fits_replays, is_static, is_unfilled

# A cache by default may take this share of the GPU memory that is free; a larger one grows as it fills instead.
SHARE_OF_FREE_MEMORY = 0.5
# Where there are CUDA graphs.
REPLAYING_DEVICES = ("cuda",)


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch could still allocate, those that it holds unused among them."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class CapturedGeneration:
    """`generate` whose greedy and sampling decode steps are replayed on a GPU, with nothing asked for.

    A static cache of the caller's is replayed too. `cache_implementation="dynamic"`, `disable_compile=True` or a
    `compile_config` choose otherwise, as everywhere in Transformers. The cache and the graph of the last call are kept
    for the next one, see `free_generation_memory`.
    """

    def free_generation_memory(self: Any) -> None:
        """Free the cache and the graph that `generate` keeps for its next call.

        The cache takes at most a sixteenth of a GPU's memory, the graph as much as one step. `train()`, and moving the
        model or changing its dtype, free them too.
        """
        forget(self)

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            forget(self)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        forget(self)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        past = model_kwargs.get("past_key_values")
        if isinstance(past, ReplayedCache) and past.length < max_cache_length:
            past.make_room(self.config, rounded(max_cache_length))
        if past is None and self._may_be_static(generation_config, generation_mode):
            sequences = batch_size * generation_config.num_return_sequences
            length = max(max_cache_length, generation_config.max_cache_len or 0)
            made_for = circumstances(self, sequences)
            cache = take(self, made_for, length)
            if cache is None and self._has_room(generation_config, sequences, rounded(length)):
                cache = ReplayedCache(self.config, rounded(length))
                cache.made_for = made_for
            if cache is not None:
                model_kwargs["past_key_values"] = cache
                return
        arguments = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        super()._prepare_cache_for_generation(*arguments)  # type: ignore[misc]
        if past is None and self.device.type not in REPLAYING_DEVICES:
            grow_in_place(model_kwargs.get("past_key_values"))

    def _may_be_static(self: Any, generation_config: GenerationConfig, generation_mode: GenerationMode) -> bool:
        """Whether a static cache was asked for, or may be taken by default, and its steps are replayed."""
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return False
        if generation_config.cache_implementation not in (None, "static") or generation_config.use_cache is False:
            return False
        return not generation_config.prefill_chunk_size and self._may_replay(generation_config)

    def _has_room(self: Any, generation_config: GenerationConfig, sequences: int, length: int) -> bool:
        if generation_config.cache_implementation == "static":
            return True
        window = self.config.sliding_window
        tokens = sum(
            width * (min(length, window) if kind == "sliding_attention" else length)
            for width, kind in zip(self.config.cache_widths, self.config.layer_types, strict=True)
        )
        return sequences * tokens * self.dtype.itemsize < SHARE_OF_FREE_MEMORY * free_memory(self.device)

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As Transformers', but where a sequence outgrows longrope's short factors, all keys are computed anew.

        Raises:
            ValueError: it outgrows them, and a part of it was given as embeddings, which are not kept.
        """
        switch, cached = self.model.rotary_emb.switch, past_key_values.get_seq_length() if past_key_values else 0
        length = input_ids.shape[1] if inputs_embeds is None else cached + 1
        if switch is not None and 0 < cached <= switch < length:
            if inputs_embeds is not None:
                raise ValueError(
                    f"with its {length}. token the text outgrows longrope's original_max_position_embeddings={switch}, "
                    "and its keys cannot be computed anew from inputs_embeds: give input_ids"
                )
            past_key_values, kwargs["next_sequence_length"] = None, None
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]

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
        # A prompt's logits may be large, and are not wanted any more.
        logits, outputs = outputs.logits[:, -1].clone(), None
        step, room, slots = getattr(cache, "step", None), _room(cache), cache.get_max_length()
        if step is None:
            step = DecodeStep(cache, self.config.layer_types, input_ids.shape[0], capture_cuda_graph)
        mask, position = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if position is None:
            position = torch.as_tensor(cache.get_seq_length() - 1).view(1, 1)

        reports = [Report(input_ids.device, input_ids.shape[0]) for _ in range(2)]
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        pad, can_end = generation_config._pad_token_tensor, any(hasattr(c, "eos_token_id") for c in stopping_criteria)
        count, ended = 0, False
        with self._optimize_model_for_decode(), step.behind(cache, mask, position[..., -1:]):
            while True:
                # Texts may be on the CPU: then tokens are chosen there, as in Transformers.
                scores = logits_processor(input_ids, logits.to(input_ids.device, torch.float32, copy=True))
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
                if count == room:
                    if reports[count % 2].read(None):
                        break
                    raise ValueError(f"the static cache of {slots} tokens is full, and one more is to come")
                logits = step(self, cache, token)
                count += 1
            if ended:
                # The step that was under way when the last sequence ended.
                step.undo(cache)
                input_ids = input_ids[:, :-1]
        if not ended:
            reports[count % 2].read(streamer)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            if isinstance(cache, ReplayedCache):
                cache.step = None
            return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)
        if isinstance(cache, ReplayedCache):
            cache.step = step
            keep(self, cache)
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
        # A cache that is replayed cannot be begun anew.
        switch = self.model.rotary_emb.switch
        if switch is not None and generation_config.max_length > switch:
            return False
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        return prepare is CapturedGeneration.prepare_inputs_for_generation

    def _can_capture(self: Any, generation_config: GenerationConfig, model_kwargs: dict) -> bool:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return False
        # Of embeddings, `max_length` does not say how long the text becomes.
        if model_kwargs.get("inputs_embeds") is not None and self.model.rotary_emb.switch is not None:
            return False
        return fits_replays(model_kwargs.get("past_key_values"), self.config) and self._may_replay(generation_config)

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
        if is_static(past_key_values) and is_unfilled(past_key_values):
            past_key_values = None
        return masking_utils.create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, **kwargs
        )


def _room(cache: Cache) -> int | None:
    """Tokens that a caller's cache can still take; None where there is no end: windows forget, `generate` measures."""
    if isinstance(cache, ReplayedCache) or all(cache.is_sliding):
        return None
    return int(cache.get_max_length() - cache.get_seq_length())
