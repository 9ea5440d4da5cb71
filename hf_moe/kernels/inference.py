"""What our model looks up: attention on latents in Transformers' registry, the rest in its own, `FUSED`.

Triton is imported at the first call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.absorbed_hf_moe import LATENT_ATTENTION
from ..model.fused_hf_moe import FUSED, WITH_GRADIENT
from . import tuning
from .experts import known_activation
from .stand_ins import causal_lm_loss

# From here on a product over all tokens beats one that reads the router's weight once a token.
_FEW_TOKENS = 64


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounds: bool = True) -> torch.Tensor:
    """See `rms_norm.rms_norm`."""
    from .rms_norm import rms_norm

    return rms_norm(x, weight, eps, rounds)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """See `cross_entropy.cross_entropy`."""
    from .cross_entropy import cross_entropy

    return cross_entropy(logits, target, ignore_index)


def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rms_norm.add_rms_norm`."""
    from .rms_norm import add_rms_norm

    return add_rms_norm(x, branch, weight, eps)


def latent_entry(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `latent_entry.latent_entry`."""
    from .latent_entry import latent_entry

    return latent_entry(*tensors, **options)


def expert_choice(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """See `expert_choice.expert_choice`; None where there are too many tokens for it."""
    if x.shape[0] > _FEW_TOKENS:
        return None
    from .expert_choice import expert_choice

    return expert_choice(x, weight, bias, **options)


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """See `small_batch.linear`; None where there are too many tokens for it."""
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < rows.shape[0] <= tuning.SINGLE_ROWS or x.dtype != weight.dtype:
        return None
    from .small_batch import linear

    return linear(rows, weight).view(*x.shape[:-1], -1)


def gated_mlp(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act_fn: Any, added: torch.Tensor | None
) -> torch.Tensor | None:
    """See `small_batch.gated_mlp`; None for too many tokens, or an activation that it does not know."""
    act = known_activation(act_fn)
    rows = x.reshape(-1, x.shape[-1])
    few = 0 < rows.shape[0] <= tuning.SINGLE_ROWS
    if (
        act is None
        or act[1] != 1.0
        or not few
        or any(t.dtype != x.dtype for t in (gate, up, down, x if added is None else added))
    ):
        return None
    from .small_batch import gated_mlp

    added = None if added is None else added.reshape(rows.shape).contiguous()
    return gated_mlp(rows, gate, up, down, act[0], added).view(x.shape)


def latent_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    q_latent: torch.Tensor | None,
    w_uv: torch.Tensor,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    end: torch.Tensor | None = None,
    window: int | None = None,
    pages: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, None]:
    """The attention function "hf_moe_latent" of the absorbed form.

    Args:
        query: rotated queries (B, H, S, P). q_latent: queries on latents (B, H, S, C), or None.
        key, value: the cache as stored: rotary keys (B, 1, L, G·P) and latents (B, 1, L, C).
        w_uv: (H, V, C), what makes values of latents.
        pages: of packed sequences, as `paging_hf_moe.update_paged` returns them with its keys and latents.
        Others as in `latent_decode.latent_decode`.
    Returns:
        attended values (B, S, H, V), and no weights.
    """
    from . import latent_decode as kernels

    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks_H": s_aux, "value_HVC": w_uv}
    options["window"] = window
    with torch.cuda.device_of(query):
        if pages is not None:
            return kernels.latent_decode_packed(q_latent, query, value, key, **options, **pages), None
        options |= {"attention_mask": attention_mask, "is_causal": is_causal, "end_B": end}
        return kernels.latent_decode(q_latent, query, value, key, **options), None


def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(function)
    def call(first: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *arguments, **options)

    return call


def register() -> None:
    """Enter the functions above under their names."""
    ALL_ATTENTION_FUNCTIONS.register(LATENT_ATTENTION, latent_attention)
    functions = rms_norm, cross_entropy, add_rms_norm, latent_entry, expert_choice, few_rows_linear, gated_mlp
    FUSED.update({function.__name__: _on_its_device(function) for function in functions})
    FUSED["causal_lm_loss"] = causal_lm_loss
    WITH_GRADIENT.update(("rms_norm", "cross_entropy"))
