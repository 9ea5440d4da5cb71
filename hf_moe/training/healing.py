"""Healing: a compressed model learns back what it lost, from the model that it was made of; see `distillation`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from .distillation import HealingTrainer
from .uniform import can_be_padded, copy_back, padded

TRAINED = {"attention": "the attention's weights and the norms in it", "all": "every weight"}


@dataclass(frozen=True)
class Healing:
    """Choices of one run.

    Attributes:
        train: a key of `TRAINED`.
        tokens: how many are read, a text that is shorter again from its beginning; whole steps of batch · length.
        learning_rate: the highest of a cosine with a tenth of warm-up. What was not damaged is easily lost: at 1.2e-3
            SmolLM2-135M forgot all that it knew.
        layer_weight: λ, 0 for logits alone.
        save_steps: a checkpoint each so many steps. seed: of the order of the rows.

    Raises:
        ValueError: with the number that cannot be.
    """

    train: str = "all"
    tokens: int = 10_000_000
    length: int = 512
    batch: int = 32
    learning_rate: float = 3e-4
    layer_weight: float = 0.0
    save_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise ValueError(f"train={self.train!r} is unknown; known are {', '.join(TRAINED)}")
        for name, least in (("length", 2), ("batch", 1), ("save_steps", 1), ("tokens", self.batch * self.length)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("learning_rate", "layer_weight"):
            # Written so that NaN is refused.
            if not 0 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of at least 0")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // (self.batch * self.length)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"steps": self.steps}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows (rows, length) of token ids, as Trainer's collator wants them."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


def select_parameters(model: Any, train: str) -> int:
    """Freeze what a run does not train, and return the number of weights that it does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(train == "all" or ".self_attn." in name)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def compiled_layers(*models: Any) -> Iterator[None]:
    """Compile the decoder layers of models for the time of a training, the residual stream in bfloat16.

    One graph serves the layers of one model that have the same shapes.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = 256
    hooks = []
    for model in models:
        # Under autocast the products that feed the stream are in half precision already.
        for module in (model.get_input_embeddings(), *(layer.mlp for layer in model.base_model.layers)):
            hooks.append(module.register_forward_hook(_in_half))
        for layer in model.base_model.layers:
            # Not `layer.compile()`, which takes the hooks of `recorded` in.
            layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for model in models:
            for layer in model.base_model.layers:
                del layer.forward
        torch._dynamo.config.recompile_limit = limit


def _in_half(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    # One function for all layers, so that they share a graph.
    return output.bfloat16()


class _Report(TrainerCallback):
    """Hand each logged loss to a function."""

    def __init__(self, report: Any):
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.report(state.global_step, state.max_steps, logs["loss"])


def heal(
    model: Any,
    source: Any,
    rows: torch.Tensor,
    options: Healing,
    checkpoints: Path,
    *,
    resume: bool = False,
    report: Any = None,
) -> list[list[float]]:
    """Train `model` towards `source` in place.

    Args:
        model: fp32, of Transformers. source: of the same vocabulary, in any dtype.
        rows: (rows, `options.length`) of token ids.
        checkpoints: folder for Trainer's. resume: go on from the last one in it, where there is one.
        report: called with step, steps and the mean loss since the last call.
    Returns:
        The curve [[tokens, loss], …].
    Raises:
        ValueError: vocabularies that differ, or no row.
    Cost: a forward pass of both models and a backward one; on a GPU in bfloat16 autocast, layers compiled.
    """
    sizes = [each.get_output_embeddings().weight.shape[0] for each in (model, source)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the model's vocabulary of {sizes[0]} is not the source's of {sizes[1]}")
    if not len(rows):
        raise ValueError(f"the text is shorter than length={options.length} tokens")
    # A step reads a whole batch, of a short text some rows twice.
    rows = rows.repeat(-(-options.batch // len(rows)), 1) if len(rows) < options.batch else rows
    on_gpu, steps = torch.cuda.is_available(), options.steps
    trained = padded(model) if can_be_padded(model.config) else model
    frozen = {name: parameter.requires_grad for name, parameter in trained.named_parameters()}
    select_parameters(trained, options.train)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        adam_beta2=0.95,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_steps=options.save_steps,
        save_total_limit=1,
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    # Trainer would split a batch over all GPUs, away from the hooks that read the states.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = HealingTrainer(
        trained,
        arguments,
        train_dataset=Rows(rows),
        callbacks=[_Report(report)] if report else None,
        source=source,
        layer_weight=options.layer_weight,
        compiled=on_gpu,
    )
    trainer.remove_callback(PrinterCallback)
    last, state = last_checkpoint(checkpoints) if resume else (None, trainer.state)
    if state.global_step < steps:
        with compiled_layers(trained, source) if on_gpu else _as_is():
            trainer.train(resume_from_checkpoint=last)
        state = trainer.state
    else:
        # Trainer would take one step more.
        finished = type(trained).from_pretrained(str(last), dtype=trained.dtype)
        trained.load_state_dict(finished.state_dict())
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(frozen[name])
    if trained is not model:
        copy_back(trained, model)
    per_step = options.batch * options.length
    return [[entry["step"] * per_step, entry["loss"]] for entry in state.log_history if "loss" in entry]


def last_checkpoint(folder: Path) -> tuple[str | None, TrainerState]:
    """The newest of Trainer's checkpoints that was written to its end, and its state; None and a new one of none."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            # What Trainer writes last.
            return str(path), TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError):
            continue
    return None, TrainerState()


@contextmanager
def _as_is() -> Iterator[None]:
    yield
