"""A source's attention as tensors: its projections, and the exact latent form that stands for it while it is measured.

Letters: S tokens of a sequence, D hidden, H heads, G key groups, V value width.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..model.attention_hf_moe import HfMoeAttention
from ..model.configuration_hf_moe import HfMoeConfig
from ..model.eager_hf_moe import attention_probabilities, causal_mask
from .factors import WITHOUT_BIAS, Weights
from .families import Family, Part
from .latent import select_groups
from .layerwise import DenseLayers, Passage
from .statistics import Heads
from .widths import Limits, Width, compressed_fields

# Scores of a head that is sure change nothing when they change a little, and much when they change a lot: what an error
# does is asked of softmax(score / temperature).
TEMPERATURE = 2.0


@dataclass(frozen=True)
class SourceAttention:
    """Reads the attention of any layer.

    fields: of the exact target's configuration. multiplier: of the residual branch (Granite).
    """

    dense: DenseLayers
    family: Family
    fields: dict[str, Any]
    limits: Limits
    multiplier: float

    @property
    def adds(self) -> bool:
        """Whether the attention's output is added to the stream as it is, up to the multiplier."""
        return self.fields.get("norm_placement", "pre") == "pre"

    @property
    def heads(self) -> Heads:
        """Sizes for the statistics."""
        return Heads(self.fields["num_attention_heads"], self.limits.groups, self.limits.keys)

    def weights(self, layer: int) -> Weights:
        """The four projections of a layer in float64, biases as a last column."""
        return Weights(*(self._with_bias(role, layer) for role in "qkvo"))

    def _with_bias(self, role: str, layer: int) -> torch.Tensor:
        source = self.dense.source
        weight = self._read(self.family.part(role, layer, source.config))
        part = self.family.part(role, layer, source.config, "bias")
        bias = self._read(part) if part.name in source.headers else weight.new_zeros(len(weight))
        return torch.cat([weight, bias[:, None]], dim=1)

    def _read(self, part: Part) -> torch.Tensor:
        return self.dense.source.read(part.name, part.start, part.stop).double().to(self.dense.device)

    def exact(self, layer: int, weights: Weights) -> HfMoeAttention:
        """The layer's attention in its exact latent form."""
        sizes = {"kv_lora_rank": self.limits.groups * self.limits.head, "q_lora_rank": None}
        config = self._config(layer, self.fields | sizes)
        heads, groups, head = self.fields["num_attention_heads"], self.limits.groups, self.limits.head
        expand = select_groups(heads=heads, groups=groups, nope=0, value=head, scale=1.0)
        constant = weights.value[:, -1].unflatten(0, (groups, -1))[self.heads.group].flatten()
        output = weights.output.clone()
        output[:, -1] += output[:, :-1] @ constant
        value = weights.value.clone()
        value[:, -1] = 0
        tensors = {
            "q_proj": weights.query,
            "kv_a_proj_with_mqa": torch.cat([value, weights.key]),
            "kv_b_proj": expand.double(),
            "o_proj": output,
        }
        return self._attention(config, layer, tensors)

    def compressed(self, layer: int, width: Width, tensors: dict[str, torch.Tensor]) -> HfMoeAttention:
        """The layer's attention from `compress_layer`'s tensors."""
        rank = len(tensors["q_a_proj"]) if "q_a_proj" in tensors else None
        fields = compressed_fields(self.fields, [width]) | {"q_lora_rank": rank, "q_a_layernorm": False}
        return self._attention(self._config(layer, fields), layer, tensors)

    def _config(self, layer: int, fields: dict[str, Any]) -> HfMoeConfig:
        one = {"num_hidden_layers": 1, "layer_types": [fields["layer_types"][layer]], "mlp_layer_types": ["dense"]}
        biases = {"q_bias": True, "kv_bias": True, "o_bias": True, "kv_a_layernorm": False}
        return HfMoeConfig(**{**fields, **one, **biases})

    def _attention(self, config: HfMoeConfig, layer: int, tensors: dict[str, torch.Tensor]) -> HfMoeAttention:
        with torch.device("meta"):
            attention = HfMoeAttention(config, 0).eval()
        state = {}
        for name, tensor in tensors.items():
            state[f"{name}.weight"] = tensor if name in WITHOUT_BIAS else tensor[:, :-1]
            if name not in WITHOUT_BIAS:
                state[f"{name}.bias"] = tensor[:, -1]
        for role in ("q_norm", "k_norm"):
            if role in self.family.modules():
                part = self.family.part(role, layer, self.dense.source.config)
                state[f"{role}.weight"] = self._read(part) + self.family.norm_offset
        state = {name: tensor.float().to(self.dense.device) for name, tensor in state.items()}
        attention.load_state_dict(state, assign=True)
        return attention.requires_grad_(False)


def rope_of(passage: Passage, frequencies: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (1, S, P) of the source at this layer, or of some of its frequencies."""
    cos, sin = passage.arguments["position_embeddings"]
    if frequencies is None:
        return cos, sin
    columns = torch.tensor([*frequencies, *frequencies], device=cos.device)
    return cos.index_select(-1, columns), sin.index_select(-1, columns)


def weights_at(
    module: HfMoeAttention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one sequence (1, S, D): weights (H, S, S), those at a higher temperature, and the slope of capped scores."""
    query, key, _ = projected(module, x, rope)
    scores = query @ key.transpose(2, 3) * module.scaling
    weights = attention_probabilities(module, scores, _mask(mask, scores), 0.0)
    broad = weights[0] ** (1 / TEMPERATURE)
    broad = broad / broad.sum(-1, keepdim=True)
    slope = x.new_full((), module.scaling)
    if (cap := module.config.attn_logit_softcapping) is not None:
        slope = slope * (1 - torch.tanh(scores / cap).square())[0]
    return weights[0], broad, slope


def before_output(
    module: HfMoeAttention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
) -> torch.Tensor:
    """What `o_proj` reads, (1, S, H·V), by PyTorch's attention or the plain one where scores are capped."""
    query, key, value = projected(module, x, rope)
    if module.config.attn_logit_softcapping is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=module.scaling
        )
    else:
        scores = query @ key.transpose(2, 3) * module.scaling
        out = attention_probabilities(module, scores, _mask(mask, scores), 0.0) @ value
    return out.transpose(1, 2).flatten(2)


def projected(module: HfMoeAttention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Queries (1, H, S, N + P), keys alike and values (1, H, S, V), as they meet, of what the attention reads."""
    query = module.q_proj(x) if module.config.q_lora_rank is None else module.q_b_proj(module.q_a_proj(x))
    query = module.rotated_query(query, *rope)
    return query, *module.expand_kv(*module.rotated_latent(module.kv_a_proj_with_mqa(x), *rope))


def _mask(mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    return causal_mask(scores.shape[2], scores.shape[3], scores.device) if mask is None else mask
