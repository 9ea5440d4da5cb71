"""Which experts serve how many tokens, counted layer by layer while the model runs.

Letters: E experts, K experts a token, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_moe.model.routing_hf_moe import HfMoeTopkRouter


class ExpertLoad:
    """Counts of routed rows a sparse layer and expert.

    Attributes:
        counts: int64 (sparse layers, E). The sum of a row is T · K.
    """

    def __init__(self, layers: int, experts: int):
        self.counts = torch.zeros(layers, experts, dtype=torch.int64)

    def add(self, layer: int, index_TK: torch.Tensor) -> None:
        """Count the choices of one forward pass of one layer."""
        self.counts[layer] += torch.bincount(index_TK.flatten(), minlength=self.counts.shape[1]).cpu()

    @property
    def share(self) -> torch.Tensor:
        """Part of each layer's rows that an expert served, (sparse layers, E); 1/E everywhere when even."""
        return self.counts / self.counts.sum(dim=1, keepdim=True).clamp(min=1)

    @property
    def max_over_mean(self) -> float:
        """The busiest expert of any layer over the mean: 1 when even, E/K at worst."""
        return float((self.share.amax(dim=1) * self.counts.shape[1]).max())

    @property
    def unused(self) -> float:
        """Share of all (layer, expert) pairs that served no token."""
        return float((self.counts == 0).float().mean())


@contextmanager
def measure_expert_load(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count the routing of every forward pass inside the block, of padding too: feed texts without it.

    Args:
        model: anything that contains this package's routers, wrapped by peft or not.
    Raises:
        ValueError: the model has no router.
    Cost: one `bincount` a layer and pass, copied to the host.
    """
    routers = [module for module in model.modules() if isinstance(module, HfMoeTopkRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no HfMoeTopkRouter to measure")
    load = ExpertLoad(len(routers), routers[0].num_experts)
    handles = [
        router.register_forward_hook(lambda module, args, output, layer=layer: load.add(layer, output[2]))
        for layer, router in enumerate(routers)
    ]
    try:
        yield load
    finally:
        for handle in handles:
            handle.remove()
