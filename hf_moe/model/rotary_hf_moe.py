"""Rotary position embedding: frequencies of every rope type, and the rotation of queries and keys.

Letters: B batch, S query length, P rotary width.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_hf_moe import HfMoeConfig


class HfMoeRotaryEmbedding(nn.Module):
    """cos and sin (B, S, P) of position · frequency, for every rope type that Transformers knows.

    With one rope for each layer type, `layer_type` says which; otherwise it is None. Where layers choose among the
    frequencies, P is that of the table, and `of_layers` picks.
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.layer_types: list[Any] = config.nested_rope_parameter_keys(config.rope_parameters) or [None]
        self.rope_type: Any = {t: rope_parameters_of(config, t)["rope_type"] for t in self.layer_types}
        for layer_type in self.layer_types:
            inv_freq, attention_scaling = self.compute_frequencies(layer_type)
            prefix = self._prefix(layer_type)
            self.register_buffer(f"{prefix}inv_freq", inv_freq, persistent=False)
            self.register_buffer(f"{prefix}original_inv_freq", inv_freq.clone(), persistent=False)
            setattr(self, f"{prefix}attention_scaling", attention_scaling)
        if self.layer_types == [None]:
            self.rope_type = self.rope_type[None]
        if config.rope_frequencies is not None:
            self.chosen: torch.Tensor
            self.register_buffer("chosen", self.compute_chosen(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Frequencies move, but stay in fp32: `model.bfloat16()` would turn late positions by whole radians."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    @staticmethod
    def _prefix(layer_type: str | None) -> str:
        return "" if layer_type is None else f"{layer_type}_"

    @staticmethod
    def compute_default_rope_parameters(config: HfMoeConfig, layer_type: str | None = None) -> tuple[Any, float]:
        """Frequencies theta^(-2i/P) of the original RoPE, and 1."""
        theta, width = rope_parameters_of(config, layer_type)["rope_theta"], config.head_dim
        return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float) / width), 1.0

    def compute_chosen(self) -> torch.Tensor:
        """Columns of the table that the layers take, one layer behind the other, each twice: for both halves."""
        return torch.tensor([column for pairs in self.config.rope_frequencies for column in (*pairs, *pairs)])

    @property
    def rope_types(self) -> set[str]:
        """Transformers' names of the ropes in use."""
        return set(self.rope_type.values()) if isinstance(self.rope_type, dict) else {self.rope_type}

    @property
    def switch(self) -> int | None:
        """The longest sequence whose keys have longrope's short factors; all longer ones have its long factors."""
        lengths = [
            rope_parameters_of(self.config, layer_type)["original_max_position_embeddings"]
            for layer_type in self.layer_types
            if rope_parameters_of(self.config, layer_type)["rope_type"] == "longrope"
        ]
        return min(lengths, default=None)

    def of_layers(self, tables: dict[str | None, tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        """cos and sin (B, S, P) of each layer, from the tables by layer type; picked for all layers at once."""
        keys = [t if t in tables else None for t in self.config.layer_types]
        if self.config.rope_frequencies is None:
            return [tables[key] for key in keys]
        widths = self.config.rotary_widths
        picked = {
            key: [table.index_select(-1, self.chosen).split(widths, dim=-1) for table in pair]
            for key, pair in tables.items()
        }
        return [(picked[key][0][layer], picked[key][1][layer]) for layer, key in enumerate(keys)]

    def compute_frequencies(self, layer_type: str | None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (P/2) and the factor of cos and sin."""
        rope_type = rope_parameters_of(self.config, layer_type)["rope_type"]
        if rope_type == "default":
            return self.compute_default_rope_parameters(self.config, layer_type)
        return ROPE_INIT_FUNCTIONS[rope_type](self.config, layer_type=layer_type)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = self._prefix(layer_type)
        inv_freq = getattr(self, f"{prefix}inv_freq").to(device=x.device, dtype=torch.float)
        freqs = position_ids[..., None].float() * inv_freq
        angles = torch.cat((freqs, freqs), dim=-1)
        scaling = getattr(self, f"{prefix}attention_scaling")
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)


def rope_parameters_of(config: HfMoeConfig, layer_type: str | None) -> dict[str, Any]:
    """The rope dictionary of a layer type, whether or not the configuration keeps one for each."""
    parameters: Any = config.rope_parameters
    if layer_type is not None and config.nested_rope_parameter_keys(parameters):
        return parameters[layer_type]
    return parameters


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotate pairs of numbers by their position's angle.

        (a, b) -> (a·cos - b·sin, b·cos + a·sin)

    Args:
        x: (B, heads, S, P). cos, sin: (B, S, P), both halves alike.
        interleave: pairs are (0, 1), (2, 3)… and not (i, i + P/2). The result is in the half layout either way,
            which leaves scores unchanged as long as queries and keys agree.
    Source: arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
