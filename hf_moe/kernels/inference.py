"""What our model looks up in `fused_hf_moe.FUSED`. Triton is imported at the first call."""

from typing import Any

import torch

from ..model.fused_hf_moe import FUSED

# From here on a product over all tokens beats one that reads the router's weight once a token.
_FEW_TOKENS = 64


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm.rms_norm`."""
    from .rms_norm import rms_norm

    return rms_norm(x, weight, eps)


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


def register() -> None:
    """Enter the functions above under their names."""
    FUSED.update({f.__name__: f for f in (rms_norm, add_rms_norm, latent_entry, expert_choice)})
