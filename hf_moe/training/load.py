"""Which experts serve how many tokens, counted layer by layer while a model runs.

Letters: L sparse layers, E experts, K experts a token, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels.experts import is_experts


class ExpertLoad:
    """Counts of routed rows by sparse layer and expert.

    Attributes:
        counts: int64 (L, E). The sum of a row is T · K.
    """

    def __init__(self, counts: torch.Tensor):
        self.counts = counts

    @property
    def share(self) -> torch.Tensor:
        """Part of each layer's rows that an expert served, (L, E) on the CPU; 1/E everywhere when even."""
        counts = self.counts.cpu()
        return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)

    @property
    def layer_max_over_mean(self) -> torch.Tensor:
        """(L,): the layer's busiest expert over the mean, 1 when even, E/K at worst."""
        return self.share.amax(dim=1) * self.counts.shape[1]

    @property
    def layer_unused(self) -> torch.Tensor:
        """(L,): share of the experts that served no token."""
        return (self.counts.cpu() == 0).float().mean(dim=1)

    @property
    def layer_entropy(self) -> torch.Tensor:
        """(L,): -Σ_e p_e log p_e / log E of the shares p; 1 when even, 0 when one expert serves everything."""
        share = self.share
        return -torch.special.xlogy(share, share).sum(dim=1) / torch.tensor(float(max(2, share.shape[1]))).log()

    @property
    def max_over_mean(self) -> float:
        """The busiest expert of any layer over the mean."""
        return float(self.layer_max_over_mean.max())

    @property
    def unused(self) -> float:
        """Share of all (layer, expert) pairs that served no token."""
        return float(self.layer_unused.mean())


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The modules that Transformers calls experts, by name: fused weights, called with the routers' choice.

    Raises:
        ValueError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts whose routing could be counted")
    return found


def experts_in_all(experts: Any) -> int:
    """E of a layer, on all ranks together."""
    names = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    return next((value for name in names if (value := getattr(experts.config, name, None))), experts.num_experts)


def _keep_counts(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a layer's experts run: overwrite the layer's counts with those of this pass."""
    index_TK = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    bins = experts.routed_rows.shape[0] + 1
    # A GPU counts integers deterministically, and other devices count no integers.
    index_TK = index_TK.int() if index_TK.is_cuda else index_TK.float()
    # The last bin takes the ids that stand for another rank's expert.
    experts.routed_rows.copy_(torch.histc(index_TK, bins=bins, min=0, max=bins)[:-1])


class RoutingCounter:
    """Adds up the routing of a model's forward passes on its device, without host synchronisation.

    A layer keeps the counts of its last pass only, and the end of the base model's forward adds them up: gradient
    checkpointing runs layers again in the backward, and that is not counted. All layers share one hook function, so
    that `torch.compile` makes one graph of them.

    Args:
        model: any model with experts (`experts_of`), wrapped or not, already on its device.
        training_only: leave out passes in evaluation mode.

    Attributes:
        load: `ExpertLoad` of everything since the last `reset`.
    """

    def __init__(self, model: nn.Module, training_only: bool = False):
        self.experts = list(experts_of(model).values())
        self.training_only = training_only
        sizes = {experts_in_all(experts) for experts in self.experts}
        if len(sizes) > 1:
            raise ValueError(f"layers have different numbers of experts, {sorted(sizes)}: they cannot share a table")
        (size,) = sizes
        for experts in self.experts:
            if not hasattr(experts, "routed_rows"):
                device = next(experts.parameters()).device
                experts.routed_rows = torch.zeros(size, dtype=torch.int64, device=device)
        self.load = ExpertLoad(self.experts[0].routed_rows.new_zeros(len(self.experts), size))
        self.passes = 0
        holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and set(self.experts) <= {*m.modules()}]
        base = holders[-1] if holders else model
        self._handles = [
            e.register_forward_pre_hook(_keep_counts, prepend=True, with_kwargs=True) for e in self.experts
        ]
        self._handles.append(base.register_forward_hook(self._add))

    def _add(self, base: nn.Module, *_: Any) -> None:
        if base.training or not self.training_only:
            self.passes += 1
            counts = self.load.counts
            counts += torch.stack([experts.routed_rows.to(counts.device) for experts in self.experts])

    def reset(self) -> None:
        """Begin at zero again."""
        self.load.counts.zero_()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        for experts in self.experts:
            if _keep_counts not in experts._forward_pre_hooks.values():
                del experts.routed_rows


@contextmanager
def measure_expert_load(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count the routing of every forward pass inside the block, of padding too: feed texts without it.

    Args:
        model: this package's or any mixture of Transformers', wrapped by peft or not.
    Raises:
        ValueError: the model has no experts; or it was compiled and ran before the block, so that its code does not
            count (`torch.compiler.set_stance("force_eager")` around the block leaves that code aside).
    Cost: one histogram a layer and pass, on the model's device.
    """
    counter = RoutingCounter(model)
    try:
        yield counter.load
    finally:
        counter.remove()
    if counter.passes and not counter.load.counts.any():
        raise ValueError(f"{counter.passes} passes were not counted: the model was compiled before the counting began")
