"""What takes the place of parts of a loaded Transformers model on a GPU: root-mean-square norms, and the loss.

Triton is imported at the first call that can use it. Without a GPU, and while a compiler or a tracer looks on, both run
as Transformers wrote them.

Letters: T tokens, V vocabulary, D width of a norm.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..model.fused_hf_moe import fused, is_untouched


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Transformers' `ForCausalLMLoss`, from the logits as they are: they are not copied to fp32, nor is their gradient.

        loss = Σ_t -log softmax(logits[t])[label[t + 1]] / n      n = num_items_in_batch, or the labels that count

    Args:
        logits: (…, V), of any dtype; the sums are in fp32 or better. labels: (…), of the same positions.
        shift_labels: labels of the next positions, in the place of labels.
    Returns:
        the loss, a scalar in fp32 or better.
    Gradients: logits. Cost: as of `cross_entropy.cross_entropy`; memory of one gradient beside the logits.
    """
    kernel = fused("cross_entropy", logits)
    if kernel is None:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target_T = shift_labels.to(logits.device).reshape(-1)
    total = kernel(logits.reshape(-1, vocab_size), target_T, ignore_index).sum()
    if num_items_in_batch is None:
        return total / (target_T != ignore_index).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


class StandInNorm(nn.Module):
    """The first base of a norm's class: the numbers of the second one, in one pass each way."""

    weight: nn.Parameter
    rounds: bool

    def forward(self, hidden_states: Tensor) -> Tensor:
        if kernel := fused("rms_norm", hidden_states, self.weight):
            return kernel(hidden_states, self.weight, _eps(self), self.rounds)
        return super().forward(hidden_states)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made at run time, so that a pickle names what it is made of."""
        found: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[1], self.rounds), *found[2:]


@functools.cache
def _stand_in(kind: Any, rounds: bool) -> Any:
    return type(kind.__name__, (StandInNorm, kind), {"rounds": rounds, "__module__": kind.__module__})


def _blank(kind: Any, rounds: bool) -> Any:
    found = _stand_in(kind, rounds)
    return found.__new__(found)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def rounding_of(module: nn.Module) -> bool | None:
    """Whether a norm of Transformers rounds its quotient (see `rms_norm.rms_norm`); None if it is not that norm.

    Its class says so by the numbers that it computes: there are dozens of copies, and some multiply by 1 + weight.
    """
    kind: Any = type(module)
    weight = getattr(module, "weight", None)
    if (
        "RMSNorm" not in kind.__name__
        or not kind.forward.__module__.startswith("transformers.models.")
        or len(inspect.signature(kind.forward).parameters) != 2
        or not is_untouched(module, kind)
        or [name for name, _ in module.named_parameters()] != ["weight"]
        or not isinstance(weight, Tensor)
        or weight.ndim != 1
        or not isinstance(_eps(module), float)
    ):
        return None
    make = torch.Generator().manual_seed(0)
    x_TD = torch.randn((16, len(weight)), generator=make).bfloat16()
    weight_D = torch.randn(len(weight), generator=make).bfloat16()
    found = torch.func.functional_call(module, {"weight": weight_D}, (x_TD,))
    wide = x_TD.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _eps(module))
    for rounds, plain in ((True, weight_D * unit.bfloat16()), (False, (weight_D * unit).bfloat16())):
        if found.dtype == plain.dtype and torch.equal(found, plain):
            return rounds
    return None


def stand_in(model: nn.Module) -> None:
    """Give the norms of a model these kernels, and its causal language models this loss; others stay as they are."""
    module: Any
    for module in model.modules():
        rounds = rounding_of(module)
        if rounds is not None:
            kind: Any = type(module)
            module.__class__ = _stand_in(kind, rounds)
        # A base model has no loss, and warns when it is asked.
        has_loss = isinstance(module, PreTrainedModel) and module.loss_type in LOSS_MAPPING
        if has_loss and module.loss_function is ForCausalLMLoss:
            module.loss_function = causal_lm_loss


def step_back(model: nn.Module) -> None:
    """Undo `stand_in`."""
    module: Any
    for module in model.modules():
        if isinstance(module, StandInNorm):
            module.__class__ = type(module).__bases__[1]
        if isinstance(module, PreTrainedModel) and module.__dict__.get("_loss_function") is causal_lm_loss:
            del module._loss_function
