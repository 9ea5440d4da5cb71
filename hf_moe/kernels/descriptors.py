"""How operands lie in memory: which strides the kernels take, and descriptors for Hopper's bulk tensor copies."""

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .tuning import Tile, nvidia_generation


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Hopper or newer; the interpreter plays it."""
    if device.type == "cuda":
        return nvidia_generation(device) >= 9
    return bool(triton.knobs.runtime.interpret)


def can_describe(tensor: torch.Tensor) -> bool:
    """A descriptor needs Hopper or newer, 16-byte rows and a contiguous last dimension."""
    if not has_copy_engine(tensor.device):
        return False
    *strides, last = tensor.stride()
    misaligned = tensor.data_ptr()
    for stride in strides:
        misaligned |= stride * tensor.element_size()
    return last == 1 and misaligned % 16 == 0 and tensor.numel() > 0


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose rows are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_side(weight: torch.Tensor) -> torch.Tensor:
    """weight, or a copy with one side of each matrix contiguous; which of the two does not matter to the kernels."""
    return weight if 1 in weight.stride()[1:] else weight.contiguous()


def row_descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def weight_descriptor(weight_EOI: torch.Tensor, groups: int, columns: int, depth: int) -> TensorDescriptor:
    """Tiles of `columns` output columns, taken in equal parts from each group, by `depth` input columns."""
    E, n_out, n_in = weight_EOI.shape
    stride_e, stride_o, stride_i = weight_EOI.stride()
    part = n_out // groups
    if stride_i == 1:
        shape, strides = [E, groups, part, n_in], [stride_e, part * stride_o, stride_o, 1]
        return TensorDescriptor(weight_EOI, shape, strides, [1, groups, columns // groups, depth])
    shape, strides = [E, n_in, groups, part], [stride_e, stride_i, part, 1]
    return TensorDescriptor(weight_EOI, shape, strides, [1, depth, groups, columns // groups])


def programs(tile: Tile, work: int, device: torch.device) -> int:
    """Programs to launch for `work` tiles: one each, or a fixed number that loops over them."""
    if not tile.per_sm:
        return work
    return max(1, min(work, tile.per_sm * processors(device)))


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 only where the user lets torch use it for matrix products."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
