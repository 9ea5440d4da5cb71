"""How far a model's next-token distributions are from its source's, without the logits of all tokens in memory.

    KL(p ‖ q) = Σ_v p_v (log p_v - log q_v)        p of the source, q of the student, over the whole vocabulary

Letters: N tokens, D hidden, V vocabulary; two models may differ in D, so the source's is M.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# Tokens whose logits are in memory at once.
CHUNK = 2048


@dataclass(frozen=True)
class Head:
    """A language model's head: logits = cap · tanh(h Wᵀ / (scaling · cap)), or h Wᵀ / scaling without a cap."""

    weight_VD: torch.Tensor
    scaling: float
    cap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """That of a causal model of Transformers."""
        config = model.config
        scaling, cap = getattr(config, "logits_scaling", None), getattr(config, "final_logit_softcapping", None)
        return cls(model.get_output_embeddings().weight, scaling or 1.0, cap)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in the hidden states' dtype."""
        logits_NV = F.linear(hidden_ND, self.weight_VD.to(hidden_ND.dtype)) / self.scaling
        return logits_NV if self.cap is None else torch.tanh(logits_NV / self.cap) * self.cap


def divergence_of_logits(
    student_NV: torch.Tensor, source_NV: torch.Tensor, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_n KL(softmax(source_n) ‖ softmax(student_n)) in fp32, and its gradient q - p to the student's logits.

    With a `cap` the gradient is that to the logits before it: times 1 - (z / cap)².
    """
    log_q, log_p = student_NV.float().log_softmax(-1), source_NV.float().log_softmax(-1)
    p = log_p.exp()
    gradient = log_q.exp() - p
    if cap is not None:
        gradient = gradient * (1 - (student_NV.float() / cap).square())
    return (p * (log_p - log_q)).sum(), gradient.to(student_NV.dtype)


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value, chunk by chunk, so that no logits outlive their chunk."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, source_NM, head, source_head, of_logits):
        half_VD, half_VM = weight_VD.to(hidden_ND.dtype), source_head.weight_VD.to(source_NM.dtype)
        head, source_head = Head(half_VD, head.scaling, head.cap), Head(half_VM, source_head.scaling, source_head.cap)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_ND), CHUNK):
            chunk = slice(start, start + CHUNK)
            student_NV, source_NV = head.logits(hidden_ND[chunk]), source_head.logits(source_NM[chunk])
            value, dlogits_NV = of_logits(student_NV, source_NV, head.cap)
            total += value
            dhidden_ND[chunk] = dlogits_NV @ half_VD / head.scaling
            if dweight_VD is not None:
                dweight_VD += (dlogits_NV.T @ hidden_ND[chunk]).float() / head.scaling
        count = max(1, len(hidden_ND))
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.count, ctx.dtype = count, weight_VD.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dhidden_ND, dweight_VD = ctx.saved_tensors
        scale = grad / ctx.count
        dweight = None if dweight_VD is None else (dweight_VD * scale).to(ctx.dtype)
        return (dhidden_ND * scale).to(dhidden_ND.dtype), dweight, None, None, None, None


def divergence(
    hidden_ND: torch.Tensor, head: Head, source_NM: torch.Tensor, source_head: Head, of_logits: Any = None
) -> torch.Tensor:
    """Mean over tokens of KL(source ‖ student), from the hidden states before the two heads.

    Args:
        hidden_ND: the student's, behind its last norm; source_NM: the source's. Products are made in their dtypes.
        of_logits: `divergence_of_logits`, where wanted compiled.
    Returns:
        Scalar, fp32. 0 for no tokens.
    Gradients: to `hidden_ND` and, where it requires one, to the student's head; none to the source.
    Cost: 2·N·V·(3·D + M) FLOPs with the gradient, 2·N·V·D more for that of the head; memory of `CHUNK`·V logits a
        few times.
    Source: arXiv:1503.02531 at temperature 1; the gradient made in the forward pass as in arXiv:2410.10989.
    """
    return _Divergence.apply(
        hidden_ND, head.weight_VD, source_NM.detach(), head, source_head, of_logits or divergence_of_logits
    )


@dataclass(frozen=True)
class Agreement:
    """What a model says of a text beside its source: means over tokens, the loss of the next token in nats."""

    tokens: int
    kl: float
    top1: float
    loss: float
    source_loss: float

    def to_dict(self) -> dict[str, float]:
        """For JSON, with perplexities."""
        perplexities = {"ppl": math.exp(self.loss), "ppl_source": math.exp(self.source_loss)}
        return {"tokens": self.tokens, "kl": self.kl, "top1": self.top1, **perplexities}


@torch.no_grad()
def measure_agreement(model: Any, source: Any, rows: torch.Tensor, batch: int = 8) -> Agreement:
    """Run both models over rows of token ids (rows, length), each row a text of its own.

    Returns:
        KL and top-1 agreement over all tokens, losses over all but the last of each row; the models' own precision.
    """
    head, source_head = Head.of(model), Head.of(source)
    sums = torch.zeros(4, dtype=torch.float64, device=head.weight_VD.device)
    for ids in rows.split(batch):
        ids = ids.to(head.weight_VD.device)
        states = [each.base_model(input_ids=ids, use_cache=False).last_hidden_state for each in (model, source)]
        for row, hidden_ND, source_NM in zip(ids, *states, strict=True):
            student_NV, source_NV = head.logits(hidden_ND), source_head.logits(source_NM)
            kl, _ = divergence_of_logits(student_NV, source_NV, None)
            same = (student_NV.argmax(-1) == source_NV.argmax(-1)).sum()
            losses = [
                F.cross_entropy(logits[:-1].float(), row[1:], reduction="sum") for logits in (student_NV, source_NV)
            ]
            sums += torch.stack([kl, same, *losses]).double()
    kl, same, loss, source_loss = sums.tolist()
    tokens, targets = rows.numel(), rows.numel() - len(rows)
    return Agreement(tokens, kl / tokens, same / tokens, loss / targets, source_loss / targets)
