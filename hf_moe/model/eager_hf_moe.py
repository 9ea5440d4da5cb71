"""Attention over expanded keys and values in plain PyTorch, with soft-caps and sinks.

Letters: B batch, S query length, L cached length, H heads, N + P width of a key, V width of a value.
"""

from typing import Any

import torch
from torch import nn


def attention_probabilities(
    module: Any, scores: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Softmax, in fp32 or better, of scaled scores (B, H, S, L), soft-capped, masked, with sinks; in their dtype."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    cap = module.config.attn_logit_softcapping
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    if module.sinks is None:
        weights = scores.softmax(dim=-1, dtype=dtype)
    else:
        sinks = module.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        weights = torch.cat((scores, sinks.to(scores.dtype)), dim=-1).softmax(dim=-1, dtype=dtype)[..., :-1]
    return nn.functional.dropout(weights.to(scores.dtype), p=dropout, training=module.training)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over expanded keys (B, H, L, N + P) and values (B, H, L, V); returns (B, S, H, V), weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = causal_mask(query.shape[2], key.shape[2], query.device)
    weights = attention_probabilities(module, scores, attention_mask, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def causal_mask(query_length: int, key_length: int, device: torch.device) -> torch.Tensor:
    """(S, L) of booleans: query i sees keys 0 to i.

    Transformers leaves the mask out when the queries are the first tokens; L is above S if a static cache holds them.
    """
    return torch.ones(query_length, key_length, dtype=torch.bool, device=device).tril()
