"""Launches that skip what Triton works out anew for each: types and alignment of arguments, and the kernel they choose.

A layer's step is some twenty launches, and on the host Triton takes longer for one than all else that is done for it.
"""

import functools
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Kernels remembered for each function: a training run has few shapes, and each is a small entry.
_MOST = 4096


class Launched:
    """A jitted function, launched as always: `kernel[grid](*arguments, **options)`.

    For arguments as of an earlier launch the compiled kernel is called directly. Numbers count as they are, tensors by
    dtype and alignment, descriptors by dtype and block. Options are the constants that follow the arguments in the
    function's signature, and the compiler's.
    """

    def __init__(self, jit: JITFunction) -> None:
        self.jit = jit
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        key = (
            driver.active.get_current_device(),
            *options.items(),
            *[
                (a.dtype, a.data_ptr() % 16)
                if isinstance(a, torch.Tensor)
                else (a.base.dtype, *a.block_shape)
                if isinstance(a, (TensorDescriptor, GluonDescriptor))
                else a
                for a in arguments
            ],
        )
        found = self._compiled.get(key)
        if found is None:
            if len(self._compiled) >= _MOST:
                self._compiled.clear()
            kernel = self.jit[grid](*arguments, **options)
            self._compiled[key] = kernel, tuple(options[name] for name in self.jit.arg_names[len(arguments) :])
        else:
            kernel, constants = found
            kernel[(*grid, 1, 1)[:3]](*arguments, *constants)


def launched(function: Any) -> Any:
    """Decorates a function over `triton.jit` or `gluon.jit`; in the interpreter nothing changes."""
    return Launched(function) if isinstance(function, JITFunction) else function
