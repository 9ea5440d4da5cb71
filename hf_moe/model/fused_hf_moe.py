"""Kernels for a GPU that the `hf_moe` package registers; the plain PyTorch beside each call is its truth.

A folder from the Hub works without the package: then nothing is registered, and the plain form runs.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch

# name → function; its arguments are those at the call.
FUSED: dict[str, Callable] = {}
# Names of those that have a gradient, and do under autocast what the plain form does.
WITH_GRADIENT: set[str] = set()


def fused(name: str, *tensors: torch.Tensor | None) -> Callable | None:
    """The kernel registered under this name, where it gives what the plain form would for these tensors.

    It is opaque to a tracer, takes ordinary tensors of one of three dtypes and, unless it is in WITH_GRADIENT, has no
    gradient and knows no autocast.
    """
    kernel = FUSED.get(name)
    if kernel is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if name not in WITH_GRADIENT and (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")):
        return None
    first = tensors[0]
    assert first is not None
    if first.device.type != "cuda":
        return None
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.device == first.device
            and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        ):
            return None
    return kernel


def is_untouched(module: torch.nn.Module, kind: type) -> bool:
    """Whether a module is of just this class, without adapter, quantisation, hook or wrapped forward."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def is_bare(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a layer is one weight and nothing more."""
    return is_untouched(layer, torch.nn.Linear) and layer.bias is None


def apply_linear(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), by a kernel for few tokens where there is one."""
    if is_bare(layer) and (kernel := fused("few_rows_linear", x, layer.weight)) is not None:
        y = kernel(x, layer.weight)
        if y is not None:
            return y
    return layer(x)
