"""Multi-head latent attention: projections, the latent cache, expanded and absorbed forms.

Letters: B batch, S query length, L cached length, D hidden, H heads, G key groups, C latent width, P rotary width,
N position-free width of a key head, V width of a value head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .absorbed_hf_moe import (
    absorbed_attention,
    absorbed_in_pages,
    absorption_pays,
    packed_absorption_pays,
    split_groups,
)
from .configuration_hf_moe import HfMoeConfig
from .eager_hf_moe import eager_attention_forward
from .fused_hf_moe import apply_linear, fused, is_untouched
from .paging_hf_moe import half_width, update_paged
from .rotary_hf_moe import apply_rotary_pos_emb, rope_parameters_of
from .slots_hf_moe import Ring, filled_layer, is_unfilled


class HfMoeRMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps), in fp32 or better. Source: arXiv:1910.07467."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if kernel := fused("rms_norm", hidden_states, self.weight):
            return kernel(hidden_states, self.weight, self.variance_epsilon)
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def add_and_norm(
    norm: nn.Module, hidden_states: torch.Tensor, branch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the two, and its norm."""
    if isinstance(norm, HfMoeRMSNorm) and is_untouched(norm, HfMoeRMSNorm):
        same = hidden_states.dtype == branch.dtype == norm.weight.dtype
        if same and (kernel := fused("add_rms_norm", hidden_states, branch, norm.weight)):
            return kernel(hidden_states, branch, norm.weight, norm.variance_epsilon)
    total = hidden_states + branch
    return total, norm(total)


def softmax_scale(config: HfMoeConfig, layer_type: str) -> float:
    """Factor of the scores: explicit, or (N + P)^-0.5 times yarn's squared mscale. Source: arXiv:2309.00071."""
    if config.softmax_scale is not None:
        return config.softmax_scale
    scale = config.qk_head_dim**-0.5
    rope = rope_parameters_of(config, layer_type)
    mscale_all_dim = rope.get("mscale_all_dim") or 0.0
    if rope["rope_type"] != "default" and mscale_all_dim and rope["factor"] > 1:
        mscale = 0.1 * mscale_all_dim * math.log(rope["factor"]) + 1.0
        scale *= mscale * mscale
    return scale


class HfMoeAttention(nn.Module):
    """Attention whose cache holds, per token, one latent of C numbers and G rotary keys of P numbers.

        c      = norm(W_a x)                      k_g = rope(norm(W_k x)_g)          cached: c and k_1 … k_G
        score  = (q_nope,h · W_uk,h c + q_rope,h · k_g(h)) · scale                   g(h) = ⌊h · G / H⌋
        out    = W_o concat_h Σ softmax(score) W_uv,h c

    Expanded form: keys and values are computed from the latents for all L positions; cheaper when S is near L.
    Absorbed form: W_uk goes into the query and W_uv behind the softmax, so the cache is read once, as stored;
    cheaper when few queries meet many cached tokens. `forward` counts FLOPs and takes the cheaper one.

    Cost: expanded 2·L·C·H·(N+V) + 2·S·L·H·(N+P+V), absorbed 2·S·C·H·(N+V) + 2·S·L·H·(2C+P) FLOPs a sequence.
    Cache: (C + G·P) numbers a token.
    Source: arXiv:2405.04434 section 2.1; GQA (arXiv:2305.13245) is G > 1, N = 0.
    """

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        # Layers for multi-token prediction stand behind the last one, and are as wide.
        layer = min(layer_idx, config.num_hidden_layers - 1)
        self.kv_lora_rank = config.latent_widths[layer]
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.rotary_widths[layer]
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.num_key_value_groups = 1  # keys and values reach the attention function with all H heads
        self.scaling = softmax_scale(config, self.layer_type)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.can_fuse = config.qk_norm is None

        query_width = config.num_attention_heads * self.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.q_bias)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.q_bias)
            if config.q_a_layernorm:
                self.q_a_layernorm = HfMoeRMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        key_width = config.num_key_value_heads * self.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.kv_lora_rank + key_width, bias=config.kv_bias)
        if config.kv_a_layernorm:
            self.kv_a_layernorm = HfMoeRMSNorm(self.kv_lora_rank, config.latent_norm_eps)
        expanded_width = config.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, expanded_width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.v_head_dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = HfMoeRMSNorm(self.qk_rope_head_dim if per_head else query_width, config.rms_norm_eps)
            self.k_norm = HfMoeRMSNorm(self.qk_rope_head_dim if per_head else key_width, config.rms_norm_eps)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended hidden states (B, S, D) and, where the attention function has them, the weights."""
        layer = filled_layer(past_key_values, self.layer_idx)
        query, latent, k_rot = self.project(hidden_states, position_embeddings, layer)
        # All slots of a ring are in use, or hidden by the mask.
        pages, end = None, layer.cumulative_length if layer is not None and type(layer) is not Ring else None
        if (paged := kwargs.pop("cache", None)) is not None:
            read_index = kwargs["read_index"][paged.layer_to_allocator[self.layer_idx].index]
            in_place = packed_absorption_pays(self, query, read_index, kwargs["max_length_q"])
            half = half_width(self.config)
            latent, k_rot, pages = update_paged(paged, latent, k_rot, self.layer_idx, half, kwargs, in_place)
        elif layer is not None and latent is layer.keys:
            pass  # a kernel has entered them
        elif is_unfilled(past_key_values, self.layer_idx):
            # A prompt attends to itself, not to all the slots of a static cache.
            past_key_values.update(latent, k_rot, self.layer_idx)
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
                attention_mask = attention_mask[..., : latent.shape[2]]
        elif past_key_values is not None:
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)

        dropout = self.attention_dropout if self.training else 0.0
        if pages is not None:
            attn_output, attn_weights = absorbed_in_pages(self, query, latent, k_rot, pages)
        elif absorption_pays(self, query, latent, attention_mask):
            attn_output, attn_weights = absorbed_attention(self, query, latent, k_rot, attention_mask, dropout, end)
        else:
            key, value = self.expand_kv(latent, k_rot)
            attn_output, attn_weights = self.attention_function()(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **self.score_options(),
                **kwargs,
            )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return apply_linear(self.o_proj, attn_output), attn_weights

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple, layer: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, S, N + P), and what the cache keeps: latents (B, 1, S, C) and rotated keys (B, 1, S, G·P).

        Args:
            layer: a static cache's layer, or a ring. Where a kernel writes latents and keys into it, its two tensors
                are returned.
        """
        cos, sin = position_embeddings
        if self.config.q_lora_rank is None:
            query = apply_linear(self.q_proj, hidden_states)
        else:
            query = apply_linear(self.q_a_proj, hidden_states)
            query = apply_linear(self.q_b_proj, self.q_a_layernorm(query) if self.config.q_a_layernorm else query)
        latent_key = apply_linear(self.kv_a_proj_with_mqa, hidden_states)
        norm = self.kv_a_layernorm if self.config.kv_a_layernorm else None
        can_fuse = self.can_fuse and (norm is None or is_untouched(norm, HfMoeRMSNorm))
        weight = norm.weight if norm is not None and can_fuse else None
        kernel = fused("latent_entry", query, latent_key, weight) if can_fuse else None
        if kernel is None or query.dtype != latent_key.dtype or (weight is not None and weight.dtype != query.dtype):
            query = self.rotated_query(query, cos, sin)
            return query, *self.rotated_latent(latent_key, cos, sin)
        return kernel(
            query,
            latent_key,
            cos,
            sin,
            heads=query.shape[-1] // self.qk_head_dim,
            nope=self.qk_nope_head_dim,
            latent_width=self.kv_lora_rank,
            norm_C=weight,
            eps=norm.variance_epsilon if norm is not None else 0.0,
            interleave=self.config.rope_interleave,
            cache=(layer.keys, layer.values, layer.cumulative_length) if layer is not None else None,
            ring=type(layer) is Ring,
        )

    def rotated_query(self, query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, S, N + P), the last P numbers of each rotated, of projected ones (B, S, H·(N + P))."""
        if self.config.qk_norm == "projection":
            query = self.q_norm(query)
        query = query.unflatten(-1, (-1, self.qk_head_dim))
        if self.config.qk_norm == "head":
            query = self.q_norm(query)
        q_nope, q_rot = query.transpose(1, 2).split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_rot = apply_rotary_pos_emb(q_rot, cos, sin, self.config.rope_interleave)
        return torch.cat((q_nope, q_rot), dim=-1) if self.qk_nope_head_dim else q_rot

    def rotated_latent(
        self, latent_key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, 1, S, C) and rotated keys (B, 1, S, G·P) of projected ones (B, S, C + G·P)."""
        latent, k_rot = latent_key.tensor_split([self.kv_lora_rank], dim=-1)
        if self.config.kv_a_layernorm:
            latent = self.kv_a_layernorm(latent)
        if self.config.qk_norm == "projection":
            k_rot = self.k_norm(k_rot)
        k_rot = k_rot.unflatten(-1, (-1, self.qk_rope_head_dim))
        if self.config.qk_norm == "head":
            k_rot = self.k_norm(k_rot)
        k_rot = apply_rotary_pos_emb(k_rot.transpose(1, 2), cos, sin, self.config.rope_interleave)
        # One "head" and dtype for both: a static cache gives its two tensors the same. Autocast rounds either later on.
        k_rot = k_rot.transpose(1, 2).flatten(2).unsqueeze(1)
        return latent.unsqueeze(1).to(latent_key.dtype), k_rot.to(latent_key.dtype)

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, H, L, N + P) and values (B, H, L, V) of latents (B, 1, L, C) and rotary keys (B, 1, L, G·P).

        The name is Transformers': vLLM's backend replaces the method.
        """
        expanded = self.kv_b_proj(kv_nope.squeeze(1)).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        k_nope, value = expanded.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_rot = split_groups(k_rot, self.qk_rope_head_dim)
        key = k_rot.repeat_interleave(value.shape[1] // k_rot.shape[1], dim=1)
        return torch.cat((k_nope, key), dim=-1) if self.qk_nope_head_dim else key, value

    def score_options(self) -> dict[str, Any]:
        """Soft-cap and sinks, where there are some, under the names by which flash and flex attention take them."""
        options: dict[str, Any] = {}
        if self.config.attn_logit_softcapping is not None:
            options["softcap"] = self.config.attn_logit_softcapping
        if self.sinks is not None:
            options["s_aux"] = self.sinks
        return options

    def attention_function(self) -> Callable:
        """The function that the configuration names, or the eager one where PyTorch's lacks what this model needs.

        Raises:
            ValueError: flash attention that would leave something out.
        """
        name = self.config._attn_implementation
        # PyTorch's fused attention has neither sinks nor soft-caps, and would leave them out without a word.
        # "paged|eager" would update the cache itself, with expanded keys.
        if name == "paged|eager" or (name == "sdpa" and self.score_options()):
            return eager_attention_forward
        if "flash" in name and self.v_head_dim > self.qk_head_dim:
            raise ValueError(
                f"{name} needs values no wider than keys, got v_head_dim={self.v_head_dim} and "
                f"qk_nope_head_dim + qk_rope_head_dim={self.qk_head_dim}; choose sdpa, eager or flex_attention"
            )
        if name == "flash_attention_2" and self.sinks is not None:
            raise ValueError(f"{name} has no attention sinks; choose sdpa, eager, flex_attention or flash_attention_3")
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
