"""`generate` without launch gaps: a static cache by default, and decode steps that replay one captured CUDA graph.

Letters: B batch, S query length, L slots of the cache, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

# A cache by default may take this share of the GPU memory that is free; a larger one grows as it fills instead.
SHARE_OF_FREE_MEMORY = 0.5


def is_static(cache: Any) -> bool:
    """Whether every layer keeps its slots at one address and its length in a tensor, so that replays can write both."""
    return isinstance(cache, Cache) and bool(cache.layers) and all(type(layer) is StaticLayer for layer in cache.layers)


def is_unfilled(cache: Any, layer: int = 0) -> bool:
    """Whether this layer of a cache is static and has seen no token yet."""
    if not isinstance(cache, Cache) or layer >= len(cache.layers):
        return False
    return type(cache.layers[layer]) is StaticLayer and not cache.layers[layer].is_initialized


class CapturedStep:
    """model(**inputs) for one more token a sequence, as one replay of a CUDA graph.

    The first call at new shapes runs as it is, which also warms up what is compiled lazily; the second is captured;
    from then on inputs are copied to where the graph reads them. What cannot be captured runs as it is: several
    queries, a cache that moves, outputs besides the logits.

    The logits of a step are overwritten by the next one: `generate` copies them.
    Cost: one eager step and one capture for each call of `generate`; the graph's memory is that of one eager step.
    """

    def __init__(self, model: nn.Module, capture: Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]):
        self.model = model
        self.capture = capture
        self.key: tuple | None = None
        self.replay: Callable[[], None] | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: Any = None

    def __call__(self, **inputs: Any) -> Any:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        if not self.can_capture(tensors, others):
            return self.model(**inputs)
        key = (
            tuple((name, value.shape, value.dtype) for name, value in sorted(tensors.items())),
            tuple((name, id(value)) for name, value in sorted(others.items())),
        )
        if key != self.key:
            self.key, self.replay = key, None
            return self.model(**inputs)
        if self.replay is None:
            self.inputs = {name: value.clone() for name, value in tensors.items()}
            self.replay, self.outputs = self.capture(lambda: self.model(**self.inputs, **others))
        for name, value in tensors.items():
            self.inputs[name].copy_(value)
        self.replay()
        return self.outputs

    @staticmethod
    def can_capture(tensors: dict[str, torch.Tensor], others: dict[str, Any]) -> bool:
        query = tensors.get("input_ids", tensors.get("inputs_embeds"))
        if query is None or query.shape[1] != 1 or not is_static(others.get("past_key_values")):
            return False
        wanted = ("output_attentions", "output_hidden_states", "output_router_logits", "labels")
        return not any(others.get(name) for name in wanted) and not isinstance(others.get("attention_mask"), dict)


def capture_cuda_graph(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record what `call` launches, without running it. Returns what replays it, and where its results will be."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


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
        if self.device.type != "cuda" or model_kwargs.get("past_key_values") is not None:
            return False
        if generation_config.cache_implementation is not None or generation_config.use_cache is False:
            return False
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return False
        if generation_config.disable_compile or generation_config.is_assistant or generation_config.prefill_chunk_size:
            return False
        if (
            set(self.config.layer_types) != {"full_attention"}
            or len(set(getattr(self, "hf_device_map", {}).values())) > 1
        ):
            return False
        sequences = batch_size * generation_config.num_return_sequences
        needed = sequences * length * sum(self.config.cache_widths) * self.dtype.itemsize
        return needed < SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(self.device)[0]

    def get_compiled_call(self: Any, compile_config: Any) -> Callable:
        """A replayed graph in place of a compiled one, unless a `compile_config` asks for that.

        The loop over experts asks the host which of them have tokens, so that it cannot be captured: it runs as it is.
        """
        if compile_config is not None or self.device.type != "cuda" or torch.distributed.is_initialized():
            return super().get_compiled_call(compile_config)  # type: ignore[misc]
        if self.config._experts_implementation == "eager":
            return self.__call__
        return CapturedStep(self, capture_cuda_graph)

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Transformers', in fewer launches for one more token, and without a mask where none is needed in a prefill.

        A prompt that fills a static cache attends to itself and not to the cache's slots: its mask has its own length.
        """
        if is_static(past_key_values) and set(config.layer_types) == {"full_attention"}:
            assert past_key_values is not None
            if is_unfilled(past_key_values):
                past_key_values = None
            elif inputs_embeds.shape[1] == 1 and config._attn_implementation == "sdpa":
                return mask_of_one_token(past_key_values, attention_mask, inputs_embeds)
        return masking_utils.create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, **kwargs
        )


def mask_of_one_token(cache: Cache, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, L) of booleans: the slots that are written, this token's included, and no padding."""
    slots = cache.get_max_length()
    seen = torch.arange(slots, device=inputs_embeds.device) <= cache.get_seq_length()
    if attention_mask is None:
        return seen.expand(inputs_embeds.shape[0], 1, 1, -1)
    padded = nn.functional.pad(attention_mask.bool(), (0, slots - attention_mask.shape[1]))
    return (padded & seen)[:, None, None]
