"""Gradients for operators, without a look at the schema in each call.

`torch.library.register_autograd` asks the schema for every argument whenever it is called: a tenth of a millisecond for
an operator of 17 arguments, where a layer's backward takes three.
"""

from collections.abc import Callable
from typing import Any

import torch


def register_gradient(name: str, backward: Callable, setup: Callable, library: torch.library.Library) -> None:
    """`torch.library.register_autograd` for an operator of the library "hf_moe" whose arguments have no defaults.

    Args:
        backward: (ctx, *gradients of results) → gradients of arguments, a tuple.
        setup: (ctx, inputs, output), which keeps what backward needs.
    """
    op = getattr(torch.ops.hf_moe, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup(ctx, inputs, output)
            return output

    Gradient.backward = staticmethod(backward)  # type: ignore[assignment]
    Gradient.__name__ = f"GradientOf_{name}"

    def apply(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Gradient.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    torch.library.impl(f"hf_moe::{name}", "Autograd", lib=library)(apply)
