"""Weights packed into 32-bit integers, dequantised a block of rows at a time.

    w[o, i] = (q[o, i] - z[o, g(i)]) · s[o, g(i)]      g(i) the group of input i: i ÷ group size, or what g_idx says

    GPTQ                qweight (I / n, O)           qzeros (G, O / n), z - 1 in "gptq", z in "gptq_v2"    scales (G, O)
    AWQ "gemm"          qweight (I, O / 8)           qzeros (G, O / 8)                                     scales (G, O)
    compressed-tensors  weight_packed (O, I / n)     weight_zero_point (O / n, G)                    weight_scale (O, G)

n numbers of b bits stand in one integer, the first in the lowest bits; AWQ's eight in the order 0 2 4 6 1 3 5 7.
compressed-tensors stores q and z with 2^(b - 1) added.

Letters: I inputs, O outputs, G groups.
Source: arXiv:2210.17323 (GPTQ), arXiv:2306.00978 (AWQ); layouts of AutoGPTQ, AutoAWQ and compressed-tensors.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Outputs that are unpacked at once: intermediate numbers take a few times their memory.
_BLOCK = 512
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(packed: "torch.Tensor", bits: int, dim: int) -> "torch.Tensor":
    """The numbers in int32 `packed`, 32 ÷ bits for each along `dim`, first in the lowest bits, as int32."""
    import torch

    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    spread = packed.movedim(dim, -1).unsqueeze(-1) >> shifts
    return (spread & (2**bits - 1)).flatten(-2).movedim(-1, dim)


def groups_of(inputs: int, groups: int, g_idx: "torch.Tensor | None") -> "torch.Tensor":
    """The group of each input.

    Raises:
        ValueError: inputs that do not divide, or an index that names no group.
    """
    import torch

    if g_idx is None or (g_idx.numel() and bool((g_idx == -1).all())):
        if inputs % groups:
            raise ValueError(f"{inputs} inputs are not divisible by {groups} groups of scales")
        return torch.arange(inputs) // (inputs // groups)
    if g_idx.shape != (inputs,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"a g_idx of {g_idx.numel()} numbers does not place {inputs} inputs in {groups} groups")
    return g_idx.long()


def dequantise_gptq(
    stored: Mapping[str, "torch.Tensor"], start: int, stop: int, *, bits: int, first_version: bool
) -> "torch.Tensor":
    """Rows `start` to `stop` of (O, I) in float32. `first_version`: zero points are stored as z - 1."""
    import torch

    packed, scales = stored["qweight"], stored["scales"]
    group = groups_of(packed.shape[0] * 32 // bits, scales.shape[0], stored.get("g_idx"))
    packed_zeros = stored["qzeros"]
    if first_version:
        # Of whole integers, as its writers subtract: a zero point of 0 borrows from its neighbour.
        packed_zeros = packed_zeros + sum(1 << shift for shift in range(0, 31, bits))
    zeros = unpack(packed_zeros, bits, 1)
    weight = torch.empty(stop - start, len(group))
    for first, last in _blocks(start, stop):
        q_IO, scale_GO = unpack(packed[:, first:last], bits, 0), scales[:, first:last].float()
        weight[first - start : last - start] = ((q_IO - zeros[group, first:last]) * scale_GO[group]).T
    return weight


def dequantise_awq(stored: Mapping[str, "torch.Tensor"], start: int, stop: int) -> "torch.Tensor":
    """Rows `start` to `stop` of (O, I) in float32, of 4 bits."""
    import torch

    packed, scales = stored["qweight"], stored["scales"]
    group = groups_of(packed.shape[0], scales.shape[0], None)
    # Where output j of eight stands among the eight that one integer unpacks to.
    order = torch.tensor(_AWQ_ORDER).argsort()
    weight = torch.empty(stop - start, len(group))
    for first, last in _blocks(start, stop):
        at = torch.arange(first, last)
        integers, at = slice(first // 8, -(-last // 8)), at // 8 * 8 + order[at % 8] - first // 8 * 8
        q_IO, zero_GO = (unpack(each[:, integers], 4, 1)[:, at] for each in (packed, stored["qzeros"]))
        weight[first - start : last - start] = ((q_IO - zero_GO[group]) * scales[:, first:last].float()[group]).T
    return weight


def dequantise_compressed(stored: Mapping[str, "torch.Tensor"], start: int, stop: int, *, bits: int) -> "torch.Tensor":
    """Rows `start` to `stop` of (O, I) in float32; `weight_packed` holds these rows only, the others all."""
    import torch

    packed, half = stored["weight_packed"], 2 ** (bits - 1)
    inputs = packed.shape[1] * (32 // bits)
    if (shape := stored["weight_shape"].tolist())[1:] != [inputs]:
        raise ValueError(f"weight_shape says {shape} of weights packed for {inputs} inputs")
    scales = stored["weight_scale"].float()
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
    group = groups_of(inputs, scales.shape[1], stored.get("weight_g_idx"))
    zeros = stored.get("weight_zero_point")
    if zeros is None:
        zeros = torch.zeros(1, scales.shape[1], dtype=torch.int32)
    elif zeros.dtype == torch.int32:
        zeros = unpack(zeros, bits, 0) - half
    weight = torch.empty(stop - start, inputs)
    for first, last in _blocks(start, stop):
        q_OI = unpack(packed[first - start : last - start], bits, 1) - half
        scale_OG, zero_OG = (each if each.shape[0] == 1 else each[first:last] for each in (scales, zeros))
        weight[first - start : last - start] = (q_OI - zero_OG[:, group]) * scale_OG[:, group]
    return weight


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, _BLOCK):
        yield first, min(first + _BLOCK, stop)
