"""Root-mean-square norm of rows, and of the sum of two, in one pass.

Letters: T rows, D their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import chains, follow
from .tuning import power_of_2


@triton.jit
def _rms_norm_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, out_ptr, D, eps,
    HAS_BRANCH: tl.constexpr, CHAINED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    follow(CHAINED)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    x = tl.load(x_ptr + row + d, mask=d < D, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row + d, mask=d < D, other=0.0)
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row + d, x, mask=d < D)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)).to(x.dtype)
    tl.store(out_ptr + row + d, (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype), mask=d < D)


def _launch(x: Tensor, branch: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float) -> None:
    D = x.shape[-1]
    block = power_of_2(D)
    grid = (x.numel() // D,)
    if grid[0]:
        has_branch, chained = branch is not x, chains(x.device)
        _rms_norm_kernel[grid](
            x, branch, weight, total, out, D, eps, has_branch, chained, block,
            num_warps=max(4, min(block // 512, 16)), launch_pdl=chained,
        )  # fmt: skip


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """y = weight · x / sqrt(mean(x²) + eps), the mean in fp32; the quotient is rounded before the product.

    Args:
        x: (..., D); fp32, bf16 or fp16. weight_D: in x's dtype.
    Returns:
        y, contiguous, in x's dtype.
    Gradients: none. Cost: x is read and y written once, one launch.
    Source: arXiv:1910.07467.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, x, weight_D, out, out, eps)
    return out


def add_rms_norm(x: Tensor, branch: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and `rms_norm` of it as rounded to x's dtype. Arguments as there, `branch` like x."""
    x, branch = x.contiguous(), branch.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, branch, weight_D, total, out, eps)
    return total, out
