"""Root-mean-square norm of rows, its gradient, and the norm of a sum, each in one pass.

    y = weight · x̂        x̂ = x · s        s = 1 / sqrt(mean(x²) + eps)
    dx = s · (g - x̂ · mean(g · x̂))        g = weight · dy        dweight = Σ dy · x̂ over rows

Letters: T rows, D their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import chains, follow, overlap
from .descriptors import processors
from .launching import launched
from .operators import Operator
from .tuning import cdiv, power_of_2

# Elements of a program: from so many rows on, it takes several narrow ones.
_ELEMENTS, _MANY_ROWS = 2048, 1024
# Programs a multiprocessor that sum the weight's gradient.
_PER_SM = 4


@launched
@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    T,
    D,
    eps,
    HAS_BRANCH: tl.constexpr,
    ROUNDS: tl.constexpr,
    CHAINED: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow(CHAINED)
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    at, mask = t * D + d, (t < T) & (d < D)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=mask)
    unit = x.to(tl.float32)
    unit *= tl.rsqrt(tl.sum(unit * unit, 1) / D + eps)[:, None]
    if ROUNDS:
        unit = unit.to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (weight * unit).to(out_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit(do_not_specialize=["T"])
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    part_ptr,
    T,
    D,
    eps,
    ROUNDS: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BM, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * BM, T, tl.num_programs(0) * BM):
        t = first + tl.arange(0, BM)[:, None]
        at, mask = t.to(tl.int64) * D + d, (t < T) & (d < D)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        unit = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(unit * unit, 1) / D + eps)[:, None]
        unit *= scale
        if NEEDS_WEIGHT:
            # What the weight was multiplied by.
            dweight += dy * (unit.to(x.dtype).to(tl.float32) if ROUNDS else unit)
        if NEEDS_X:
            g = weight * dy
            dx = scale * (g - unit * (tl.sum(g * unit, 1) / D)[:, None])
            tl.store(dx_ptr + at, dx.to(x.dtype), mask=mask)
    if NEEDS_WEIGHT:
        part_ptrs = part_ptr + tl.program_id(0) * D + d
        tl.store(part_ptrs, tl.sum(dweight, 0)[None, :], mask=d < D)


def _blocks(T: int, D: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps."""
    block = power_of_2(D)
    rows = max(1, _ELEMENTS // block) if T >= _MANY_ROWS else 1
    return rows, block, max(4, min(rows * block // 512, 16))


def _result_dtype(x: Tensor, weight_D: Tensor, rounds: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight_D.dtype) if rounds else x.dtype


def _launch(
    x: Tensor, branch: Tensor, weight_D: Tensor, total: Tensor, out: Tensor, eps: float, rounds: bool = True
) -> None:
    T, D = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    rows, block, warps = _blocks(T, D)
    if T:
        has_branch, chained = branch is not x, chains(x.device)
        _rms_norm_kernel[(cdiv(T, rows),)](
            x, branch, weight_D, total, out, T, D, eps, has_branch, rounds, chained, rows, block,
            num_warps=warps, **overlap(chained),
        )  # fmt: skip


_library = torch.library.Library("hf_moe", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps, bool rounds) -> Tensor")
_library.define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, bool rounds, bool[] needs)"
                " -> (Tensor, Tensor)")  # fmt: skip


def _forward(x, weight, eps, rounds):
    x = x.contiguous()
    out = torch.empty_like(x, dtype=_result_dtype(x, weight, rounds))
    _launch(x, x, weight.contiguous(), out, out, eps, rounds)
    return out


def _forward_fake(x, weight, eps, rounds):
    return x.new_empty(x.shape, dtype=_result_dtype(x, weight, rounds))


def _backward(dy, x, weight, eps, rounds, needs):
    needs_x, needs_weight = needs
    dy, x = dy.contiguous(), x.contiguous()
    T, D = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    rows, block, warps = _blocks(T, D)
    programs = min(cdiv(T, rows), _PER_SM * processors(x.device)) if needs_weight else cdiv(T, rows)
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    part = torch.empty((programs if needs_weight else 0, D), dtype=torch.float32, device=x.device)
    if programs:
        _rms_norm_backward_kernel[(programs,)](
            dy, x, weight.contiguous(), dx, part, T, D, eps, rounds, needs_x, needs_weight, rows, block, num_warps=warps
        )
    return dx, part.sum(0).to(weight.dtype) if needs_weight else weight.new_empty(0)


def _backward_fake(dy, x, weight, eps, rounds, needs):
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, weight), needs, strict=True))


def _setup(ctx, inputs, output):
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx, dy):
    needs = list(ctx.needs_input_grad[:2])
    found = _rms_norm_backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None, None


_rms_norm = Operator("rms_norm", _forward, _library)
_rms_norm_backward = Operator("rms_norm_backward", _backward, _library)
torch.library.register_fake("hf_moe::rms_norm", _forward_fake, lib=_library)
torch.library.register_fake("hf_moe::rms_norm_backward", _backward_fake, lib=_library)
_rms_norm.register_gradient(_autograd, _setup)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, rounds: bool = True) -> Tensor:
    """y = weight · x / sqrt(mean(x²) + eps), in fp32.

    Args:
        x: (..., D); fp32, bf16 or fp16. weight_D: any of them.
        rounds: the quotient is rounded to x's dtype before the product, as Llama does and gpt-oss does not.
    Returns:
        y, contiguous, in the dtype of the product of x and weight; in x's when the quotient is not rounded.
    Gradients: x and weight, summed in fp32 in an order that the number of multiprocessors fixes. A frozen weight costs
        nothing. Kept for backward: x and weight.
    Cost: x is read and y written once, one launch; backward, x and dy read and dx written once.
    Source: arXiv:1910.07467.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return _rms_norm(x, weight_D, eps, rounds)
    return _forward(x, weight_D, eps, rounds)


def add_rms_norm(x: Tensor, branch: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, and `rms_norm` of it as rounded to x's dtype; all of one dtype. Gradients: none."""
    x, branch = x.contiguous(), branch.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, branch, weight_D, total, out, eps)
    return total, out
