"""Cross-entropy of logits as they are, without a copy of them in fp32.

    loss[t] = log Σ_v exp(logits[t, v]) - logits[t, target[t]]
    dlogits[t, v] = dloss[t] · (exp(logits[t, v] - lse[t]) - [v = target[t]])

Letters: T tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launched
from .operators import Operator
from .tuning import cdiv, power_of_2

# Logits of a row that a program holds at once, forward and backward.
_FORWARD, _BACKWARD = 4096, 2048


@launched
@triton.jit
def _cross_entropy_kernel(logits_ptr, target_ptr, loss_ptr, lse_ptr, V, stride, ignore_index, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + t)
    logits_ptr += t * stride
    if target == ignore_index:
        tl.store(loss_ptr + t, 0.0)
        tl.store(lse_ptr + t, 0.0)
        return
    v = tl.arange(0, BLOCK)
    # Lower than any number and yet one, so that a block of nothing but -inf adds 0.
    top = tl.full((), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        logits = tl.load(logits_ptr + first + v, mask=first + v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - higher) + tl.exp(logits - higher)
        top = higher
    lse = top + tl.log(tl.sum(total, 0))
    known = (target >= 0) & (target < V)
    picked = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + t, lse - picked)
    tl.store(lse_ptr + t, lse)


@launched
@triton.jit
def _cross_entropy_backward_kernel(
    dloss_ptr, logits_ptr, target_ptr, lse_ptr, dlogits_ptr, V, stride, ignore_index, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + t)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A token without a target reads nothing.
    end = tl.where(target == ignore_index, 0, V)
    logits = tl.load(logits_ptr + t * stride + v, mask=v < end, other=-float("inf")).to(tl.float32)
    share = tl.exp(logits - tl.load(lse_ptr + t)) - tl.where(v == target, 1.0, 0.0)
    dlogits = tl.where(v < end, tl.load(dloss_ptr + t) * share, 0.0)
    tl.store(dlogits_ptr + t * V + v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=v < V)


_library = torch.library.Library("hf_moe", "FRAGMENT")
_library.define("cross_entropy(Tensor logits, Tensor target, int ignore_index) -> (Tensor, Tensor)")
_library.define("cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor lse, int ignore_index)"
                " -> Tensor")  # fmt: skip


def _block(V: int, most: int) -> dict[str, int]:
    block = min(power_of_2(V), most)
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _forward(logits, target, ignore_index):
    (T, V), logits = logits.shape, _rows(logits)
    loss, lse = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(2))
    if T:
        _cross_entropy_kernel[(T,)](
            logits, target.contiguous(), loss, lse, V, logits.stride(0), ignore_index, **_block(V, _FORWARD)
        )
    return loss, lse


def _forward_fake(logits, target, ignore_index):
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))


def _backward(dloss, logits, target, lse, ignore_index):
    (T, V), logits = logits.shape, _rows(logits)
    dlogits, block = logits.new_empty((T, V)), _block(V, _BACKWARD)
    if T:
        _cross_entropy_backward_kernel[(T, cdiv(V, block["BLOCK"]))](
            dloss.contiguous(), logits, target.contiguous(), lse, dlogits, V, logits.stride(0), ignore_index, **block
        )
    return dlogits


def _setup(ctx, inputs, output):
    logits, target, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, output[1])


def _autograd(ctx, dloss, _):
    if dloss is None:
        return None, None, None
    logits, target, lse = ctx.saved_tensors
    return _cross_entropy_backward(dloss, logits, target, lse, ctx.ignore_index), None, None


_cross_entropy = Operator("cross_entropy", _forward, _library)
_cross_entropy_backward = Operator("cross_entropy_backward", _backward, _library)
torch.library.register_fake("hf_moe::cross_entropy", _forward_fake, lib=_library)
torch.library.register_fake(
    "hf_moe::cross_entropy_backward", lambda dloss, logits, *_: logits.new_empty(logits.shape), lib=_library
)
_cross_entropy.register_gradient(_autograd, _setup)


def cross_entropy(logits_TV: Tensor, target_T: Tensor, ignore_index: int = -100) -> Tensor:
    """Each token's loss, -log softmax(logits)[target].

    Args:
        logits_TV: fp32, bf16 or fp16. They stay as they are: callers may still look at them.
        target_T: int64. A token whose target is ignore_index has the loss 0; any other number outside 0 .. V-1 gives
            NaN.
    Returns:
        loss_T in fp32, from fp32 sums.
    Gradients: logits, in their dtype; exactly zero for an ignored token. Kept for backward: logits and 4·T bytes.
    Cost: logits are read once; backward, read once and their gradient written once.
    """
    return _cross_entropy(logits_TV, target_T, ignore_index)[0]
