"""Latent attention on the cache as stored: when that is the cheaper form, in plain PyTorch, and through a kernel.

    score = (W_ukᵀ q_nope · c + q_rope · k_rope) · scale        out = W_uv Σ softmax(score) c

Letters: B batch, S query length, L cached length, H heads, G key groups, C latent width, P rotary width,
N position-free width of a key head, V width of a value head, T packed queries. `module` is an `HfMoeAttention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .eager_hf_moe import attention_probabilities, causal_mask

# The name under which `hf_moe` registers its kernel.
LATENT_ATTENTION = "hf_moe_latent"
# What PyTorch calls the question whether a CPU has a fast product in a dtype.
_MULTIPLIED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def absorption_pays(
    module: Any, query: torch.Tensor, latent: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether the absorbed form applies here and costs fewer FLOPs; decided by shapes alone."""
    s, length = query.shape[2], latent.shape[2]
    dimensions, name = 4, module.config._attn_implementation
    if "flash" in name:
        # Flash attention gets no mask, or one of tokens, and takes the queries for the last ones of the cache. Texts
        # packed in one row are known by their positions: they have no cache.
        if latent_function(module, query) is None or (s > 1 and (s == length or module.sliding_window)):
            return False
        dimensions = 2
    elif name not in ("eager", "paged|eager", "sdpa"):
        return False
    if attention_mask is not None and not (
        isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == dimensions
    ):
        return False
    return _is_plain(module.kv_b_proj, query.device) and _cheaper(module, s, length, s * length, s * length)


def packed_absorption_pays(module: Any, query: torch.Tensor, read_index: torch.Tensor, longest_query: int) -> bool:
    """The same for the sequences of continuous batching, packed in one row: only a kernel tells them apart."""
    if latent_function(module, query) is None or not _is_plain(module.kv_b_proj, query.device):
        return False
    tokens = query.shape[2]
    length = max(read_index.shape[0], tokens)
    one_by_one = min(longest_query, tokens) * length
    return _cheaper(module, tokens, length, one_by_one, tokens * length)


def _is_plain(projection: nn.Module, device: torch.device) -> bool:
    """An adapter, a quantised layer or an offloaded weight must be applied, not looked into."""
    if type(projection) is not nn.Linear or projection.weight.device != device:
        return False
    weight: Any = projection.weight
    if isinstance(weight, DTensor):
        # A sharded projection sums the latent's gradient over the ranks, which looking into it would leave out.
        if torch.is_grad_enabled():
            return False
        weight = weight.to_local()
    return type(weight) in (torch.Tensor, nn.Parameter)


def _cheaper(module: Any, queries: int, length: int, absorbed_pairs: int, expanded_pairs: int) -> bool:
    """Compare FLOPs, given the pairs of query and key that each form computes."""
    c, n = module.kv_lora_rank, module.qk_nope_head_dim
    p, v = module.qk_rope_head_dim, module.v_head_dim
    absorbed = queries * c * (n + v) + absorbed_pairs * ((2 if n else 1) * c + p)
    return absorbed < length * c * (n + v) + expanded_pairs * (n + p + v)


def latent_function(module: Any, query: torch.Tensor) -> Callable | None:
    """The kernel for the absorbed form, where one is registered, and it gives all that is asked for here."""
    if query.device.type != "cuda":
        return None
    name = module.config._attn_implementation
    if not (name == "sdpa" or "flash" in name):
        return None
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32) or torch.is_grad_enabled():
        return None
    # Autocast leaves norms and products in different dtypes.
    if torch.is_autocast_enabled("cuda"):
        return None
    if module.training and module.attention_dropout:
        return None
    return ALL_ATTENTION_FUNCTIONS.get(LATENT_ATTENTION)


def split_groups(k_rot: torch.Tensor, width: int) -> torch.Tensor:
    """Rotary keys (B, G, L, P) of cached ones (B, 1, L, G·P)."""
    return k_rot.squeeze(1).unflatten(-1, (-1, width)).transpose(1, 2)


def _projections(module: Any, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_uk (H, N, C) and W_uv (H, V, C)."""
    weight = module.kv_b_proj.weight
    w_HXC = (weight.to_local() if isinstance(weight, DTensor) else weight).unflatten(0, (num_heads, -1))
    w_uk_HNC, w_uv_HVC = w_HXC.split([module.qk_nope_head_dim, module.v_head_dim], dim=1)
    return w_uk_HNC, w_uv_HVC


def absorbed_attention(
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    end: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention on the cache as stored; returns (B, S, H, V) and weights (B, H, S, L), or None from a kernel.

    Args:
        query: (B, H, S, N + P). latent: (B, 1, L, C). k_rot: (B, 1, L, G·P).
        attention_mask: broadcastable to (B, H, S, L), boolean or additive. None: query i of several sees keys 0 to i.
            With flash attention: (B, L), 0 for padding; the queries are the last tokens.
        end: how many slots of a static cache are written, on the device; what lies behind them need not be read.
    """
    batch_size, num_heads, query_length, _ = query.shape
    kernel = latent_function(module, query)
    if kernel is not None:
        if "flash" in module.config._attn_implementation:
            options = {"is_causal": True, "end": end, "window": module.sliding_window}
            if attention_mask is not None:
                latent, k_rot = (x[:, :, : attention_mask.shape[1]] for x in (latent, k_rot))
                options, attention_mask = options | {"end": None}, attention_mask[:, None, None].bool()
        else:
            if attention_mask is None and query_length > 1:
                latent, k_rot = (x[:, :, :query_length] for x in (latent, k_rot))
            # A mask says itself what is causal.
            options = {"is_causal": attention_mask is None, "end": end if attention_mask is not None else None}
        return _through_kernel(kernel, module, query, latent, k_rot, attention_mask, options), None

    w_uk_HNC, w_uv_HVC = _projections(module, num_heads)
    key_length, dtype = latent.shape[2], None
    if _multiplies_slowly(latent):
        dtype = query.dtype
        query, latent, k_rot, w_uk_HNC, w_uv_HVC = (x.float() for x in (query, latent, k_rot, w_uk_HNC, w_uv_HVC))
    # Not the scores, which are many.
    query = query * module.scaling
    q_rot = query[..., module.qk_nope_head_dim :] if module.qk_nope_head_dim else query
    k_rot = split_groups(k_rot, module.qk_rope_head_dim)
    q_rot = q_rot.reshape(batch_size, k_rot.shape[1], -1, module.qk_rope_head_dim)
    scores = _by_sequence(q_rot, k_rot.transpose(2, 3)).view(batch_size, num_heads, query_length, key_length)
    if module.qk_nope_head_dim:
        q_nope = query[..., : module.qk_nope_head_dim]
        q_latent = _by_head(q_nope, w_uk_HNC).reshape(batch_size, 1, -1, module.kv_lora_rank)
        scores = scores + (q_latent @ latent.transpose(2, 3)).view_as(scores)
    if attention_mask is None and query_length > 1:
        attention_mask = causal_mask(query_length, key_length, query.device)
    weights = attention_probabilities(module, scores, attention_mask, dropout)

    out = (weights.reshape(batch_size, 1, -1, key_length) @ latent).view(batch_size, num_heads, query_length, -1)
    out = _by_head(out, w_uv_HVC.transpose(1, 2)).transpose(1, 2)
    return (out, weights) if dtype is None else (out.to(dtype), weights.to(dtype))


def _multiplies_slowly(x: torch.Tensor) -> bool:
    """Whether products in fp32, conversion of the whole cache included, are faster than those in x's dtype."""
    if x.device.type != "cpu" or x.dtype not in _MULTIPLIED:
        return False
    # Autocast would take fp32 back, and a tracer does not look at the machine.
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return not _is_multiplied(x.dtype)


@functools.cache
def _is_multiplied(dtype: torch.dtype) -> bool:
    """Whether this CPU has a fast product of 16-bit matrices.

    Without one 16 rows of weights times 4,096 latents of 512 numbers take 92 ms on a core, and 3 ms by way of fp32.
    """
    asks = getattr(torch.ops.mkldnn, _MULTIPLIED[dtype], None) if torch.backends.mkldnn.is_available() else None
    return asks is not None and asks()


def _by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, H, S, X) @ (H, X, Y). A broadcast product would copy the weight for each sequence."""
    rows = x.transpose(0, 1).flatten(1, 2) @ weight
    return rows.unflatten(1, (-1, x.shape[2])).transpose(0, 1)


def _by_sequence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y, where y's groups stand side by side in a cache.

    PyTorch would first copy such a y of several sequences: 13.8 ms, not 1.4, on a CPU core for four sequences of 2,048
    tokens, 32 heads and 8 groups.
    """
    if x.shape[0] == 1 or y.shape[1] == 1 or y.device.type != "cpu" or torch.compiler.is_compiling():
        return x @ y
    return torch.stack([one @ other for one, other in zip(x.unbind(), y.unbind(), strict=True)])


def absorbed_in_pages(
    module: Any, query: torch.Tensor, latent: torch.Tensor, k_rot: torch.Tensor, pages: dict[str, Any]
) -> tuple[torch.Tensor, None]:
    """Attention of queries (1, H, T, N + P) of several sequences on what `update_paged` gave; returns (1, T, H, V)."""
    kernel = latent_function(module, query)
    assert kernel is not None
    options = {"pages": pages, "window": module.sliding_window}
    return _through_kernel(kernel, module, query, latent, k_rot, None, options), None


def _through_kernel(
    kernel: Callable,
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rot: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    w_uk_HNC, w_uv_HVC = _projections(module, query.shape[1])
    q_nope, q_rot = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    # A broadcast product would copy the weight for each sequence.
    q_latent = torch.einsum("bhsn,hnc->bhsc", q_nope, w_uk_HNC) if module.qk_nope_head_dim else None
    options = options | module.score_options() | {"q_latent": q_latent, "w_uv": w_uv_HVC}
    return kernel(module, q_rot, k_rot, latent, attention_mask, module.scaling, **options)[0]
