"""Tensor parallelism of latent attention: which heads and rotary keys a rank has, and whose gradient it must sum.

Letters: H heads, G key groups, P rotary width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

try:
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
except ImportError:  # Transformers has moved it, and refuses a plan with a style that it does not know
    ALL_PARALLEL_STYLES = None


def local_heads(num_heads: int, num_groups: int, size: int, rank: int) -> tuple[slice, slice]:
    """The heads of one rank out of `size`, and the key groups that these heads read.

    Raises:
        ValueError: heads do not divide by the ranks, or a rank's heads would read groups unevenly.
    """
    if num_heads % size:
        raise ValueError(f"num_attention_heads={num_heads} is not divisible by the tensor-parallel size {size}")
    count, per_group = num_heads // size, num_heads // num_groups
    if count % per_group and per_group % count:
        raise ValueError(
            f"tensor-parallel size {size} gives a rank {count} of num_attention_heads={num_heads}, which is neither a "
            f"multiple nor a divisor of the {per_group} heads of each of num_key_value_heads={num_groups}"
        )
    first = rank * count
    return slice(first, first + count), slice(first // per_group, (first + count - 1) // per_group + 1)


class _SumGradient(torch.autograd.Function):
    """The input as it is; its gradient summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Any) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.ranks)
        return gradient, None


class LatentAttentionHeads:
    """Each rank attends with H/size heads; it computes and caches the latent, and only the rotary keys they read.

    Latents and rotary keys are computed alike on all ranks. The latent meets a sharded `kv_b_proj`, which sums its
    gradient; the rotary keys go straight into the scores, so their gradient is summed here. The same holds for
    queries that were gathered for a norm over all heads.

    The rest is Transformers' style "local_params".
    """

    def install_forward(self, module: Any, mesh: Any) -> nn.Module:
        config = module.config
        heads, groups = local_heads(
            config.num_attention_heads, config.num_key_value_heads, mesh.size(), mesh.get_local_rank()
        )
        columns = slice(groups.start * module.qk_rope_head_dim, groups.stop * module.qk_rope_head_dim)
        ranks = mesh.get_group()
        rotated_query, rotated_latent = module.rotated_query, module.rotated_latent

        def query_of_rank(*args: Any) -> Any:
            query = rotated_query(*args)
            if query.shape[1] == heads.stop - heads.start:
                return query
            return _SumGradient.apply(query, ranks)[:, heads]

        def latent_of_rank(*args: Any) -> Any:
            latent, k_rot = rotated_latent(*args)
            return latent, _SumGradient.apply(k_rot, ranks)[..., columns]

        module.rotated_query, module.rotated_latent = query_of_rank, latent_of_rank
        module.can_fuse = False
        return _local_params().install_forward(module, mesh)


def _local_params() -> Any:
    if "local_params" not in (ALL_PARALLEL_STYLES or ()):
        raise ImportError(
            "tensor parallelism of latent attention needs the parallel style 'local_params', which this version of "
            "Transformers lacks; load the model without a tensor-parallel size"
        )
    return ALL_PARALLEL_STYLES["local_params"]


def register_parallel_styles() -> None:
    """Enter the style above under the name that the configuration's plan has for it."""
    if ALL_PARALLEL_STYLES is not None:
        ALL_PARALLEL_STYLES.register("latent_attention_heads", LatentAttentionHeads())
