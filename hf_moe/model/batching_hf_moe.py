"""Continuous batching: Transformers' own, on pages that hold latents, and never an empty answer."""

import copy
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from .paging_hf_moe import sized_for_latents


class LatentBatching:
    """`generate_batch`, `init_continuous_batching` and what is built on them, such as `transformers serve`."""

    def init_continuous_batching(
        self: Any,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Transformers' own, with a cache sized for latents and the model's own attention function.

        Transformers would change to FlashAttention where it is, which expands every latent at every step; and its flash
        decoding reads keys from pages, where there are none.

        Raises:
            ValueError: beams, which continuous batching would leave out without a word.
        """
        options = generation_config or self.generation_config
        if (options.num_beams or 1) > 1:
            raise ValueError(f"continuous batching has no beams, got num_beams={options.num_beams}: use generate")
        batching: Any = continuous_batching_config or getattr(options, "continuous_batching_config", None)
        batching = copy.copy(batching) if batching is not None else ContinuousBatchingConfig()
        batching.auto_switch_to_flash, batching.max_blocks_per_request = False, 0
        manager: Any = super().init_continuous_batching(generation_config, batching, **kwargs)  # type: ignore[misc]
        if getattr(manager, "_makes_latent_cache", False):
            return manager
        manager._makes_latent_cache = True
        create = manager._create_batch_processor

        def create_for_latents() -> Any:
            with sized_for_latents(self.config):
                return create()

        manager._create_batch_processor = create_for_latents
        return manager

    def generate_batch(
        self: Any, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As Transformers' own, which logs what goes wrong and returns what there is.

        Raises:
            RuntimeError: requests without an answer, and why.
        """
        answers = super().generate_batch(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]
        expected = len(inputs) * ((generation_config or self.generation_config).num_return_sequences or 1)
        failed = {name: answer.error for name, answer in answers.items() if answer.error is not None}
        if failed or len(answers) < expected:
            reason = "; ".join(sorted(set(failed.values()))) or "see the errors logged above"
            raise RuntimeError(f"{expected - len(answers) + len(failed)} of {expected} sequences failed: {reason}")
        return answers
