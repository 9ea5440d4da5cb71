"""Trainer whose loss is how far a model is from the one that it was made of.

    loss = mean over tokens of KL(source ‖ model)  +  λ · mean over layers of |h - h_source|² / |h_source|²

No label is read: the text only says where the two models are compared, so that a model nearer to its source is all that
training can give.

Letters: B batch, S length, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from .divergence import Head, divergence, divergence_of_logits


class HealingTrainer(Trainer):
    """Trainer whose loss is the distance from another model of the same vocabulary.

    Args:
        source: that model; it moves to the training's device and stays as it is.
        layer_weight: λ of the layers' outputs; the two models need the same width and depth for it.
        compiled: compile the divergence.
    """

    # Rows are of one length, so that a mean over micro-batches is that over tokens.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, source: Any, layer_weight: float = 0.0, compiled: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.source = source.to(self.args.device).eval().requires_grad_(False)
        self.layer_weight = layer_weight
        self.of_logits = torch.compile(divergence_of_logits, dynamic=False) if compiled else divergence_of_logits

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the module's first line, for `input_ids` (B, S)."""
        # The heads' products are made below: one position of logits is the least that a model can be asked for.
        asked = {"input_ids": inputs["input_ids"], "logits_to_keep": 1, "use_cache": False}
        student, layers = self.accelerator.unwrap_model(model), bool(self.layer_weight)
        with torch.no_grad(), self.accelerator.autocast(), recorded(self.source, layers) as taught:
            self.source(**asked)
        with recorded(student, layers) as learnt:
            outputs = model(**asked)
        half = torch.bfloat16 if self.args.bf16 else self.source.dtype
        last = [states[-1].flatten(0, 1).to(half) for states in (learnt, taught)]
        loss = divergence(last[0], Head.of(student), last[1], Head.of(self.source), self.of_logits)
        if layers:
            loss = loss + self.layer_weight * layer_distance(learnt[:-1], taught[:-1])
        return (loss, outputs) if return_outputs else loss


@contextmanager
def recorded(model: Any, layers: bool) -> Iterator[list[torch.Tensor]]:
    """Collect what a forward pass gives: on request the outputs of all layers but the last, then the last norm's.

    Transformers' own `output_hidden_states` hooks the attention as well, and would cut a compiled layer in pieces.
    """
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    modules = [*(model.base_model.layers[:-1] if layers else ()), model.base_model]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def layer_distance(states: list[torch.Tensor], source_states: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of |h - h_source|² / |h_source|², each summed over all tokens, in fp32; 0 of no layer.

    Args:
        states, source_states: outputs (B, S, D) of the layers but the last, whose effect the logits show.
    Raises:
        ValueError: models of another depth or width.
    """
    shapes = [[tuple(state.shape) for state in each] for each in (states, source_states)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"layers of {shapes[0]} cannot be compared with those of the source, {shapes[1]}")
    total = torch.zeros(())
    for state, source_state in zip(states, source_states, strict=True):
        distance = (state.float() - source_state.float()).square().sum() / source_state.float().square().sum()
        total = total.to(distance.device) + distance / len(states)
    return total
