"""Balance over whole batches: the selection bias, moved against the load after every step, and the loss of that load.

Letters: E experts.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..model.modeling_hf_moe import HfMoeModel
from ..model.routing_hf_moe import HfMoeTopkRouter
from .load import experts_in_all, experts_of
from .metrics import ExpertLoadCallback

logger = logging.get_logger(__name__)

BIAS = "e_score_correction_bias"


def move_selection_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> None:
    """Make busy experts a little harder to choose and idle ones a little easier, in place.

        bias[e] += rate · sign(mean(counts) - counts[e])

    Args:
        bias_E: float32, of any shape with E numbers. counts_E: rows that each expert served in the step.
    Source: arXiv:2408.15664 algorithm 1; arXiv:2412.19437 section 2.1.2.
    """
    counts_E = counts_E.to(bias_E.device, torch.float32)
    bias_E.add_((counts_E.mean() - counts_E).sign().view_as(bias_E), alpha=rate)


def use_selection_bias(model: Any) -> Any:
    """Give this package's greedy routers a selection bias of zero, in place: the choice is at first the same.

    The configuration says "noaux_tc" from then on, so the bias is saved and loaded with the model.

    Raises:
        ValueError: a router that ranks groups by their best expert, which "noaux_tc" does otherwise; or no router.
    """
    routers = [module for module in model.modules() if isinstance(module, HfMoeTopkRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no HfMoeTopkRouter")
    for router in routers:
        if router.topk_method == "group_limited_greedy":
            raise ValueError(f"topk_method={router.topk_method!r} would choose other experts with a selection bias")
        if router.topk_method == "greedy":
            router.topk_method = "noaux_tc"
            router.n_group, router.topk_group = (router.n_group if router.topk_each_group else 1), 1
            router.register_buffer(BIAS, torch.zeros(router.num_experts, device=router.weight.device))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "topk_method", None) == "greedy":
            config.topk_method = "noaux_tc"
            config.n_group, config.topk_group = (config.n_group if config.topk_each_group else 1), 1
        if hasattr(module, "_keep_in_fp32_modules_strict"):
            module._keep_in_fp32_modules_strict = {*(module._keep_in_fp32_modules_strict or ()), BIAS}
    return model


def selection_biases(model: nn.Module) -> list[torch.Tensor]:
    """The selection bias of each sparse layer, in the order of `experts_of`, as float32 that the model uses.

    Raises:
        ValueError: a layer has none.
    """
    modules, biases = dict(model.named_modules()), []
    for name, experts in experts_of(model).items():
        size, holder = experts_in_all(experts), None
        # The router stands beside the experts, or beside what wraps them.
        while name and holder is None:
            name = name.rpartition(".")[0]
            holder = next((m for m in modules[name].modules() if _has_bias(m, size)), None)
        if holder is None:
            raise ValueError(
                f"{type(model).__name__} has no {BIAS}; a router of this package gets one by use_selection_bias(model)"
            )
        bias = getattr(holder, BIAS)
        if bias.dtype != torch.float32:
            # Half precision would round a step of 0.001 away.
            bias.data = bias.data.float()
        biases.append(bias.data)
    return biases


def _has_bias(module: nn.Module, size: int) -> bool:
    bias = getattr(module, BIAS, None)
    return isinstance(bias, torch.Tensor) and bias.numel() == size


class SelectionBiasCallback(ExpertLoadCallback):
    """`move_selection_bias` before each optimizer step, from the load of all its micro-batches on all ranks.

    Logs what `ExpertLoadCallback` logs. The bias is part of the model, so checkpoints hold it; those of a peft adapter
    do if it has the router in `modules_to_save`, and otherwise a warning says so.

    Args:
        rate: DeepSeek-V3's is 0.001 with sigmoid scores; 0 for its last tokens.
        The rest as for `ExpertLoadCallback`.
    Raises:
        ValueError, when training begins: a layer has no selection bias.
    """

    def __init__(self, rate: float = 0.001, **options: Any):
        super().__init__(**options)
        self.rate = rate
        self.biases: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        self.biases = selection_biases(model)
        holders = [name for name, module in model.named_modules() if hasattr(module, BIAS)]
        if hasattr(model, "peft_config") and not any("modules_to_save" in name for name in holders):
            logger.warning(
                f"{BIAS} moves, but is not among the adapter's files: merge the adapter before you save, or give the "
                "router to modules_to_save"
            )

    def on_step_counts(self, counts: torch.Tensor) -> None:
        """Move every layer's bias by the counts (layers, E) of this step."""
        for bias_E, counts_E in zip(self.biases, counts, strict=True):
            move_selection_bias(bias_E, counts_E, self.rate)

    def state(self) -> dict[str, Any]:
        """Arguments and counts, for the checkpoint."""
        state = super().state()
        state["args"]["rate"] = self.rate
        return state


class GlobalLoadCallback(ExpertLoadCallback):
    """Let the load-balancing loss judge the load of the last whole batch, all micro-batches and ranks together.

        loss = E · Σ_e f_e · p_e      f of the step before, p of this micro-batch

    f is the same for every part of a batch, so the loss is a mean over tokens: a step is then the same however its
    batch is split, and experts may specialise inside a micro-batch as long as the batch is even. The first step takes
    the even load, at which the loss has no gradient. For this package's model; the coefficient is its
    `router_aux_loss_coef`.

    Raises:
        ValueError, when training begins: no router of this package.
    Source: arXiv:2501.11873, with f one step late instead of an exchange inside of every layer.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.share: list[list[float]] | None = None
        self.routers: list[HfMoeTopkRouter] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        bases = [module for module in kwargs["model"].modules() if isinstance(module, HfMoeModel)]
        self.routers = [router for base in bases for router in base.routers()]
        if not self.routers:
            raise ValueError(f"{type(kwargs['model']).__name__} has no HfMoeTopkRouter")
        for layer, router in enumerate(self.routers):
            even = [1.0 / router.num_experts] * router.num_experts
            share = even if self.share is None else self.share[layer]
            router.batch_share = torch.tensor(share, device=router.weight.device)

    def on_step_counts(self, counts: torch.Tensor) -> None:
        """Keep the shares (layers, E) of this step for the next one."""
        for router, counts_E in zip(self.routers, counts, strict=True):
            assert router.batch_share is not None
            router.batch_share.copy_(counts_E / counts_E.sum().clamp(min=1))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.share = self._shares()
        for router in self.routers:
            router.batch_share = None
        self.routers = []

    def _shares(self) -> list[list[float]] | None:
        shares = [router.batch_share.tolist() for router in self.routers if router.batch_share is not None]
        return shares or self.share

    def state(self) -> dict[str, Any]:
        """Arguments, counts and shares, for the checkpoint."""
        state = super().state()
        state["attributes"]["share"] = self._shares()
        return state
