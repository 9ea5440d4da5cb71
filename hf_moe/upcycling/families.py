"""The dense families, one row each: what their tensors are called and which options of the target they use.

The table is read both ways: from a role to the family's name (`Family.part`) and from a name to its role
(`Family.role_of`). A tensor that no role claims, or an option that the target cannot hold, is refused: nothing of a
source is dropped in silence.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
# A target field's value: the source's field of that name, or a function of the whole configuration.
Rule = str | Callable[[Config], Any]


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a source tensor; all of them when `stop` is None. `branch` says of which source."""

    name: str
    start: int = 0
    stop: int | None = None
    branch: int = 0


# The branch that holds what was learnt from text: the last one, behind the sources.
CALIBRATION = -1

# Roles outside of the layers, and inside of one. Values are module names; ".weight" or ".bias" is added.
OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INNER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}
NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
# Activations of a gated MLP that Transformers knows by name and that have no parameters of their own.
ACTIVATIONS = (
    *("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu"),
    *("relu", "relu2", "relu6", "leaky_relu", "mish", "hardswish", "sigmoid", "tanh", "linear"),
)
# Those of Transformers.
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
# Buffers that old checkpoints stored and every model recomputes.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def head_dim(config: Config) -> int:
    """P: width of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotary_dim(config: Config) -> int:
    """How many numbers of a head are rotated."""
    rope = config.get("rope_parameters") or {}
    return int(head_dim(config) * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))


def _layer_types(config: Config) -> list[str]:
    if config.get("layer_types"):
        return list(config["layer_types"])
    kind = "sliding_attention" if config.get("sliding_window") else "full_attention"
    return [kind] * config["num_hidden_layers"]


def _sliding_window(config: Config) -> int | None:
    return config["sliding_window"] if "sliding_attention" in _layer_types(config) else None


def _rope(config: Config) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    for each in rope.values() if all(isinstance(each, dict) for each in rope.values()) else [rope]:
        if each.get("rope_type") not in ROPES:
            raise ValueError(f"rope_type={each.get('rope_type')!r} is not known; known are {', '.join(ROPES)}")
    # The target's P is the rotated width alone, so all of it rotates.
    rope.pop("partial_rotary_factor", None)
    original = config.get("original_max_position_embeddings")
    if original and rope.get("rope_type") == "longrope":
        rope.setdefault("original_max_position_embeddings", original)
    return rope


COMMON: Mapping[str, Rule] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "rope_parameters": _rope,
    "qk_rope_head_dim": rotary_dim,
    "qk_nope_head_dim": lambda c: head_dim(c) - rotary_dim(c),
    "v_head_dim": head_dim,
    "layer_types": _layer_types,
    "sliding_window": _sliding_window,
}
GEMMA: Mapping[str, Rule] = {
    "hidden_act": "hidden_activation",
    "embedding_multiplier": lambda c: c["hidden_size"] ** 0.5,
    "softmax_scale": lambda c: c["query_pre_attn_scalar"] ** -0.5,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type, architecture: the keys under which Transformers knows the family.
        fields: target field → source field or function; added to `COMMON`.
        constants: target fields that are the same for the whole family.
        fused: source module → roles whose rows it stacks, in order.
        norm_offset: what the family adds to a stored norm weight (Gemma: 1).
        residual_multiplier: source field that scales both residual branches (Granite).
        refused: source field → the values that the target holds; any other is an error.
        gguf_architecture, gguf_permuted_heads, gguf_norm_offset: how llama.cpp stores the family; "" where
            Transformers cannot read it back.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Rule] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norm_offset: float = 0.0
    residual_multiplier: str | None = None
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    gguf_architecture: str = ""
    gguf_permuted_heads: bool = False
    gguf_norm_offset: float = 0.0

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of a layer's norms, the same in source and target."""
        return NORMS[self.constants.get("norm_placement", "pre")]

    def modules(self) -> dict[str, str]:
        """Role → module inside a layer, fused roles at their fused module."""
        absent = {name for names in NORMS.values() for name in names} - set(self.norms)
        if self.constants.get("qk_norm") is None:
            absent |= {"q_norm", "k_norm"}
        table = {role: module for role, module in INNER.items() if role not in absent}
        table |= {role: module for module, roles in self.fused.items() for role in roles}
        return table

    def source_names(self, layers: int) -> Iterator[str]:
        """Every name that a source of this family may use, weights and biases."""
        modules = [*OUTER.values()]
        modules += [f"model.layers.{i}.{m}" for i in range(layers) for m in dict.fromkeys(self.modules().values())]
        for module in modules:
            yield f"{module}.weight"
            yield f"{module}.bias"

    def part(self, role: str, layer: int, config: Config, suffix: str = "weight") -> Part:
        """Where the source keeps a role: a tensor, or rows of a fused one."""
        if role in OUTER:
            return Part(f"{OUTER[role]}.{suffix}")
        module = self.modules()[role]
        name = f"model.layers.{layer}.{module}.{suffix}"
        start = 0
        for other in self.fused.get(module, ()):
            rows = role_rows(other, config)
            if other == role:
                return Part(name, start, start + rows)
            start += rows
        return Part(name)

    def role_of(self, name: str) -> tuple[tuple[str, ...], int | None, str] | None:
        """Roles, layer and suffix of a source name; None when the family has no such tensor."""
        stem, _, suffix = name.rpartition(".")
        for role, module in OUTER.items():
            if stem == module and suffix == "weight":
                return (role,), None, suffix
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if match is None or suffix not in ("weight", "bias"):
            return None
        roles = tuple(role for role, module in self.modules().items() if module == match[2])
        # The target holds biases of the attention's projections only.
        if not roles or (suffix == "bias" and not set(roles) <= {"q", "k", "v", "o"}):
            return None
        return roles, int(match[1]), suffix

    def target_fields(self, config: Config) -> dict[str, Any]:
        """Fields of the target's configuration that the source decides, attention and experts aside.

        Raises:
            ValueError: an option that the target cannot hold.
        """
        for name, allowed in self.refused.items():
            if config.get(name) not in allowed:
                raise ValueError(
                    f"{self.model_type} with {name}={config.get(name)!r} cannot be converted: the target holds "
                    f"{' or '.join(map(repr, allowed))}"
                )
        rules: dict[str, Rule] = {**COMMON, **self.fields}
        fields = {key: config.get(rule) if isinstance(rule, str) else rule(config) for key, rule in rules.items()}
        check_activation(fields["hidden_act"])
        return fields | dict(self.constants)


def check_activation(name: Any) -> None:
    """Raise ValueError for one that the target cannot compute."""
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not known; known are {', '.join(ACTIVATIONS)}")


def role_rows(role: str, config: Config) -> int:
    """Rows of a role's weight matrix."""
    width = head_dim(config)
    return {
        "q": config["num_attention_heads"] * width,
        "k": config["num_key_value_heads"] * width,
        "v": config["num_key_value_heads"] * width,
        "gate": config["intermediate_size"],
        "up": config["intermediate_size"],
        "o": config["hidden_size"],
        "down": config["hidden_size"],
    }[role]


FAMILIES = {
    row.model_type: row
    for row in (
        Family(
            "llama",
            "LlamaForCausalLM",
            refused={"mlp_bias": (False, None)},
            gguf_architecture="llama",
            gguf_permuted_heads=True,
        ),
        Family("mistral", "MistralForCausalLM", gguf_architecture="llama", gguf_permuted_heads=True),
        Family("qwen2", "Qwen2ForCausalLM", gguf_architecture="qwen2"),
        Family("qwen3", "Qwen3ForCausalLM", constants={"qk_norm": "head"}, gguf_architecture="qwen3"),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            fields=GEMMA,
            constants={"norm_placement": "sandwich"},
            norm_offset=1.0,
            refused={"use_bidirectional_attention": (False, None)},
            gguf_architecture="gemma2",
            gguf_norm_offset=1.0,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            fields=GEMMA,
            constants={"norm_placement": "sandwich", "qk_norm": "head"},
            norm_offset=1.0,
            refused={"use_bidirectional_attention": (False, None)},
            gguf_architecture="gemma3",
            gguf_norm_offset=1.0,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            fused={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
            gguf_architecture="phi3",
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            constants={"norm_placement": "post", "qk_norm": "projection"},
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            fields={
                "embedding_multiplier": "embedding_multiplier",
                "logits_scaling": "logits_scaling",
                "softmax_scale": "attention_multiplier",
            },
            residual_multiplier="residual_multiplier",
            refused={"mlp_bias": (False, None)},
        ),
    )
}


def family_of(config: Config) -> Family:
    """The row of a configuration.

    Raises:
        ValueError: an architecture that is not in the table; the known ones are listed.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None and isinstance(config.get("text_config"), dict):
        inner = config["text_config"].get("model_type")
        raise ValueError(
            f"{config.get('model_type')!r} is a model of more than text, and its language model's architecture is "
            f"{inner!r}; known are {', '.join(sorted(FAMILIES))}"
        )
    if family is None:
        name = config.get("model_type") or (config.get("architectures") or ["without a model_type"])[0]
        raise ValueError(f"unknown architecture {name!r}; known are {', '.join(sorted(FAMILIES))}")
    return family
