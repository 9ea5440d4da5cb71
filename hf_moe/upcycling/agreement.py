"""How far a layerwise model's next-token distributions are from its source's, from the last layer's outputs.

Letters: B sequences, S tokens of one, D hidden.
"""

import torch

from .layerwise import DenseLayers

# Tokens whose logits are in memory at once.
_CHUNK = 128


def divergences(dense: DenseLayers, exact: torch.Tensor, others: list[torch.Tensor]) -> list[float]:
    """KL in nats a token of each of the others (1, S, D), outputs of the last layer, from one."""
    totals, tokens = [0.0] * len(others), exact.shape[1]
    for start in range(0, tokens, _CHUNK):
        part = slice(start, start + _CHUNK)
        p = dense.log_probabilities(exact[0, part])
        for i, other in enumerate(others):
            totals[i] += _kl(p, dense.log_probabilities(other[0, part])) / tokens
    return totals


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def agreement(
    dense: DenseLayers, exact: list[torch.Tensor], other: list[torch.Tensor], ids: torch.Tensor
) -> dict[str, float]:
    """KL from the source in nats a token, share of equal likeliest tokens, and both perplexities.

    Args:
        exact, other: the last layer's outputs, (1, S, D) of each sequence. ids: the text, (B, S).
    """
    kl = top1 = 0.0
    losses = [0.0, 0.0]
    for b, pair in enumerate(zip(exact, other, strict=True)):
        for start in range(0, pair[0].shape[1], _CHUNK):
            p, q = (dense.log_probabilities(hidden[0, start : start + _CHUNK]) for hidden in pair)
            kl += _kl(p, q)
            top1 += float((p.argmax(-1) == q.argmax(-1)).sum())
            following = ids[b, start + 1 : start + 1 + _CHUNK, None]
            for i, each in enumerate((p, q)):
                losses[i] -= float(each[: len(following)].gather(-1, following).sum())
    tokens, predicted = ids.numel(), ids.shape[0] * (ids.shape[1] - 1)
    ppl_source, ppl = (float(torch.tensor(loss / predicted).exp()) for loss in losses)
    return {"kl": kl / tokens, "top1": top1 / tokens, "ppl": ppl, "ppl_source": ppl_source}
