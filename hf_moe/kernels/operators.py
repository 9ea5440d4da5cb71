"""Operators that autograd, torch.compile and torch's modes see whole, and that cost little where none of them looks on.

On the way to its body a call through the dispatcher enters Python twice, and `torch.library.register_autograd` asks the
schema for every argument: two tenths of a millisecond for an operator of 17 arguments, where a layer's step takes four.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ORDINARY = (Tensor, torch.nn.Parameter)
# These names are torch's own; without one of them every call goes through the dispatcher.
_NAMES = ("_len_torch_dispatch_stack", "_any_requires_grad", "_AutoDispatchBelowAutograd")
_DIRECT = all(hasattr(torch._C, name) for name in _NAMES) and hasattr(torch._C._functorch, "peek_interpreter_stack")


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a compiler, a tracer, a mode, a transform or a kind of tensor wants the operator and not its body."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or any(isinstance(a, Tensor) and type(a) not in _ORDINARY for a in arguments)
    )


class Operator:
    """An operator of the library "hf_moe", `torch.ops.hf_moe.<name>`, to be called; its arguments have no defaults.

    Args:
        body: what it computes, on the device of its first tensor, where Triton then launches. It is not differentiated.
        library: that its schema was defined in.
    """

    def __init__(self, name: str, body: Callable, library: torch.library.Library) -> None:
        @functools.wraps(body)
        def on_its_device(first: Tensor, *arguments: Any) -> Any:
            with torch.cuda.device_of(first):
                return body(first, *arguments)

        self._name, self._body, self._library = name, on_its_device, library
        self._op: Any = getattr(torch.ops.hf_moe, name).default
        self._gradient: Any = None
        torch.library.impl(f"hf_moe::{name}", "CompositeExplicitAutograd", lib=library)(on_its_device)

    def __call__(self, *arguments: Any) -> Any:
        if not _DIRECT or _is_watched(arguments):
            return self._op(*arguments)
        return self._compute(self._body, *arguments)

    def _compute(self, how: Callable, *arguments: Any) -> Any:
        if self._gradient and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self._gradient.apply(*arguments, how)
        return how(*arguments)

    def _dispatch(self, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._op(*arguments)

    def register_gradient(self, backward: Callable, setup: Callable) -> None:
        """As `torch.library.register_autograd`.

        Args:
            backward: (ctx, *gradients of results) → gradients of arguments, a tuple.
            setup: (ctx, inputs, output), which keeps what backward needs.
        """
        if not _DIRECT:
            name = f"hf_moe::{self._name}"
            torch.library.register_autograd(name, backward, setup_context=setup, lib=self._library)
            return

        class Gradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                *inputs, how = arguments
                output = how(*inputs)
                setup(ctx, tuple(inputs), output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return *backward(ctx, *gradients), None

        self._gradient = Gradient
        on_autograd = functools.partial(self._compute, self._dispatch)
        torch.library.impl(f"hf_moe::{self._name}", "Autograd", lib=self._library)(on_autograd)
