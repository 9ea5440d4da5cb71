"""How evenly experts work, in Trainer's logs and as pictures when training ends."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .load import ExpertLoad, RoutingCounter
from .pictures import can_draw, draw_balance, draw_load

logger = logging.get_logger(__name__)


def load_metrics(load: ExpertLoad, per_layer: bool = True) -> dict[str, float]:
    """Numbers for a log: the worst layer's, and each layer's.

    `max_over_mean` is the busiest expert over the mean, `unused` the share of experts without a token, `entropy` 1 when
    even. Padding counts as tokens. No token is ever dropped.
    """
    layers = {
        "max_over_mean": load.layer_max_over_mean,
        "unused": load.layer_unused,
        "entropy": load.layer_entropy,
    }
    worst = {"max_over_mean": torch.amax, "unused": torch.amax, "entropy": torch.amin}
    metrics = {f"experts/{name}": worst[name](values).item() for name, values in layers.items()}
    if per_layer:
        for name, values in layers.items():
            metrics |= {f"experts/layer_{i:02d}/{name}": value for i, value in enumerate(values.tolist())}
    return metrics


class ExpertLoadCallback(TrainerCallback, ExportableState):
    """Log the load of the experts since the last log, summed over micro-batches and ranks, and draw it at the end.

    Given as `callbacks=[...]`, the metrics reach Trainer's log history and terminal. TensorBoard and other reporters
    stand before it there: `callback.add_to(trainer)` puts it before them.

    Args:
        per_layer: log each sparse layer beside the worst.
        pictures: write `experts/load.png` and `experts/balance.png` into the output folder when training ends; without
            matplotlib, a warning when it begins says that there will be none.
    """

    def __init__(self, per_layer: bool = True, pictures: bool = True):
        self.per_layer = per_layer
        self.pictures = pictures
        self.total: list[list[int]] | None = None
        self.counter: RoutingCounter | None = None
        self.since_log = self.sum = torch.zeros(0)

    def add_to(self, trainer: Trainer) -> "ExpertLoadCallback":
        """Add this callback to a trainer, before those that report its logs."""
        later = [c for c in trainer.callback_handler.callbacks if type(c).__module__.endswith("integration_utils")]
        for callback in later:
            trainer.remove_callback(callback)
        for callback in (self, *later):
            trainer.add_callback(callback)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        if self.pictures and state.is_world_process_zero and not can_draw():
            logger.warning("there will be no pictures of the experts' load: matplotlib is not installed")
        self.counter = RoutingCounter(kwargs["model"], training_only=True)
        self.since_log = torch.zeros_like(self.counter.load.counts)
        self.sum = torch.zeros_like(self.since_log)
        if self.total is not None:
            self.sum += torch.tensor(self.total, device=self.sum.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sum the step's counts over the ranks."""
        assert self.counter is not None
        counts = self.counter.load.counts.clone()
        self.counter.reset()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        self.since_log += counts
        self.on_step_counts(counts)

    def on_step_counts(self, counts: torch.Tensor) -> None:
        """What a subclass does with the counts (layers, E) of one optimizer step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the metrics to the entry."""
        if self.counter is None or logs is None or "loss" not in logs:
            return
        metrics = load_metrics(ExpertLoad(self.since_log), self.per_layer)
        self.sum += self.since_log
        self.since_log.zero_()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting; draw."""
        if self.counter is None:
            return
        self.counter.remove()
        self.counter = None
        self.sum += self.since_log
        self.total = self.sum.tolist()
        if self.pictures and state.is_world_process_zero and can_draw():
            folder = Path(args.output_dir) / "experts"
            folder.mkdir(parents=True, exist_ok=True)
            draw_load(ExpertLoad(self.sum).share, folder / "load.png")
            draw_balance(state.log_history, folder / "balance.png")

    def state(self) -> dict[str, Any]:
        """Arguments and counts, for the checkpoint; Trainer gives them back with its
        `restore_callback_states_from_checkpoint`."""
        total = self.total if self.counter is None else self.sum.tolist()
        return {
            "args": {"per_layer": self.per_layer, "pictures": self.pictures},
            "attributes": {"total": total},
        }
