"""Launches of a decode step that overlap: each begins while the one before it ends.

A kernel calls `follow` before its first read, and the host launches it with `overlap(chains(device))`. What other
libraries launch in between waits for all that came before.
"""

import torch
import triton
import triton.language as tl

from .tuning import nvidia_generation


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait until the results of the launch before this one can be read, then let the next one begin."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers, mask, fallback):
    """Ask for the L2's lines that these pointers are in, `fallback`'s where the mask is false.

    Nothing is read by the program, so that it may come before `follow` whoever wrote the lines.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [tl.where(mask, pointers, fallback).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def chains(device: torch.device) -> bool:
    """Whether launches on this device can overlap so: Hopper and later."""
    return nvidia_generation(device) >= 9


def overlap(chained: bool) -> dict[str, bool]:
    """Launch options of a kernel that may begin early; without, none at all, since AMD's compiler refuses the name."""
    return {"launch_pdl": True} if chained else {}
