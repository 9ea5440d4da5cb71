"""Which of Transformers' own mixtures can hold a model, and what the engines that serve them would misread.

A model uses features; a format holds some of them, and an engine reads fewer. An export is refused with the feature's
name and the reason, never written so that someone computes other numbers from it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]


def _nested_rope(c: Fields) -> bool:
    return any(isinstance(value, dict) for value in (c.get("rope_parameters") or {}).values())


def _rope_types(c: Fields) -> set[str]:
    rope = c.get("rope_parameters") or {}
    return {each.get("rope_type", "default") for each in ([*rope.values()] if _nested_rope(c) else [rope])}


def _dense_first(c: Fields) -> bool:
    kinds = c["mlp_layer_types"]
    return kinds == sorted(kinds)


def union_of(by_layer: list[list[int]]) -> list[int]:
    """Frequencies of the pairs that layers use, each as often as the layer that uses it most, in order."""
    most = Counter[int]()
    for pairs in by_layer:
        most |= Counter(pairs)
    return sorted(most.elements())


def _needs_table(c: Fields) -> bool:
    width = c.get("rope_table_dim") or c["qk_rope_head_dim"]
    chosen = c.get("rope_frequencies") or [list(range(width // 2))]
    return c["num_key_value_heads"] > 1 or union_of(chosen) != list(range(width // 2))


def _latent_norms(c: Fields) -> bool:
    return c["kv_a_layernorm"] or bool(c["q_lora_rank"] and c["q_a_layernorm"])


def _sparse(c: Fields) -> bool:
    return "sparse" in c["mlp_layer_types"]


# Feature → whether a configuration of the target (HfMoeConfig as a dictionary) uses it. `experts_alike` is the
# exporter's: whether every router chooses among copies only.
FEATURES: dict[str, Callable[[Fields], bool]] = {
    "grouped-query attention": lambda c: not c["kv_a_layernorm"],
    "latents behind a norm": lambda c: c["kv_a_layernorm"],
    "several rotary keys": lambda c: c["num_key_value_heads"] > 1,
    "several rotary keys beside a normed latent": lambda c: c["kv_a_layernorm"] and c["num_key_value_heads"] > 1,
    "position-free keys in a latent without norm": lambda c: not c["kv_a_layernorm"] and c["qk_nope_head_dim"] > 0,
    "latent widths that differ by layer": lambda c: len(set(c.get("kv_lora_ranks") or [0])) > 1,
    "rotary frequencies by layer": lambda c: c.get("rope_frequencies") is not None,
    "frequencies that repeat or are left out": _needs_table,
    "query or key bias": lambda c: c["q_bias"] or c["kv_bias"],
    "output bias": lambda c: c["o_bias"],
    "norms a query and key head": lambda c: c["qk_norm"] == "head",
    "norms over all query and key heads": lambda c: c["qk_norm"] == "projection",
    "head size of its own": lambda c: c["v_head_dim"] * c["num_attention_heads"] != c["hidden_size"],
    "sliding window": lambda c: "sliding_attention" in c["layer_types"],
    "sliding and full layers mixed": lambda c: len(set(c["layer_types"])) > 1,
    "a rope for each layer type": _nested_rope,
    "rope on neighbouring pairs": lambda c: c["rope_interleave"],
    "rope scaling other than yarn": lambda c: bool(_rope_types(c) - {"default", "yarn"}),
    "rope that changes with the length": lambda c: "dynamic" in _rope_types(c),
    "explicit softmax scale": lambda c: c["softmax_scale"] is not None,
    "score soft-cap": lambda c: c["attn_logit_softcapping"] is not None,
    "logit soft-cap": lambda c: c["final_logit_softcapping"] is not None,
    "attention sinks": lambda c: c["attention_sinks"],
    "norms behind the branches": lambda c: c["norm_placement"] != "pre",
    "norm epsilon other than 1e-6": lambda c: c["rms_norm_eps"] != 1e-6,
    "embedding multiplier": lambda c: c["embedding_multiplier"] != 1,
    "logits scaling": lambda c: c["logits_scaling"] != 1,
    "latent norm epsilon other than 1e-6": lambda c: _latent_norms(c) and c["latent_norm_eps"] != 1e-6,
    "query bottleneck without norm": lambda c: bool(c["q_lora_rank"]) and not c["q_a_layernorm"],
    "dense layers": lambda c: "dense" in c["mlp_layer_types"],
    "dense layers behind sparse ones": lambda c: not _dense_first(c),
    "no layer with experts": lambda c: "sparse" not in c["mlp_layer_types"],
    "shared experts": lambda c: bool(c["n_shared_experts"] or c["shared_expert_intermediate_size"]),
    "no shared experts": lambda c: not (c["n_shared_experts"] or c["shared_expert_intermediate_size"]),
    "shared experts of a width of their own": lambda c: bool(c["shared_expert_intermediate_size"]),
    "gated shared experts": lambda c: c["shared_expert_gate"],
    "softmax router": lambda c: _sparse(c) and c["scoring_func"] == "softmax",
    "softmax router of experts that differ": lambda c: (
        _sparse(c) and c["scoring_func"] == "softmax" and not c.get("experts_alike")
    ),
    "sigmoid router": lambda c: _sparse(c) and c["scoring_func"] == "sigmoid",
    "selection bias": lambda c: _sparse(c) and c["topk_method"] == "noaux_tc",
    "expert groups ranked by their best expert": lambda c: _sparse(c) and c["topk_method"] == "group_limited_greedy",
    "as many experts of each group": lambda c: _sparse(c) and c["topk_each_group"],
    "weights that are not normalised": lambda c: _sparse(c) and not c["norm_topk_prob"],
    "routed scaling factor": lambda c: _sparse(c) and c["routed_scaling_factor"] != 1,
}


def _common(c: Fields) -> dict[str, Any]:
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads hidden_act max_position_embeddings"
    names += " initializer_range rms_norm_eps tie_word_embeddings pad_token_id bos_token_id eos_token_id"
    names += " rope_parameters num_experts_per_tok router_aux_loss_coef dtype"
    return {name: c[name] for name in names.split() if name in c}


def _mixtral(c: Fields) -> dict[str, Any]:
    return _common(c) | {
        "num_key_value_heads": c["num_key_value_heads"],
        "head_dim": c["v_head_dim"],
        "intermediate_size": c["moe_intermediate_size"],
        "num_local_experts": c["n_routed_experts"],
        "sliding_window": c["sliding_window"],
    }


def _qwen3_moe(c: Fields) -> dict[str, Any]:
    return _common(c) | {
        "num_key_value_heads": c["num_key_value_heads"],
        "head_dim": c["v_head_dim"],
        "intermediate_size": c["intermediate_size"],
        "moe_intermediate_size": c["moe_intermediate_size"],
        "num_experts": c["n_routed_experts"],
        "norm_topk_prob": c["norm_topk_prob"],
        "mlp_only_layers": [i for i, kind in enumerate(c["mlp_layer_types"]) if kind == "dense"],
    }


def _deepseek_v3(c: Fields) -> dict[str, Any]:
    # The attention's are `StockLayout.fields`.
    names = "intermediate_size moe_intermediate_size n_routed_experts routed_scaling_factor"
    names += " n_group topk_group norm_topk_prob"
    fields = _common(c) | {name: c[name] for name in names.split()}
    fields.pop("router_aux_loss_coef", None)
    return fields | {
        # The class always has one; without, it is one of zeros.
        "n_shared_experts": c["n_shared_experts"] or 1,
        "first_k_dense_replace": c["mlp_layer_types"].count("dense"),
        # Transformers writes none of these; vLLM and SGLang read them, with other defaults.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


@dataclass(frozen=True)
class Mixture:
    """A class of Transformers that we read.

    Attributes:
        architecture: its name in config.json.
        block: its name of the mixture; experts: our projection → its own; shared: its name of the shared experts.
        latent: whether its attention is latent already.
        qk_norm: as in our configuration.
    """

    model_type: str
    architecture: str
    block: str = "mlp"
    experts: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    )
    shared: str = "shared_experts"
    latent: bool = False
    qk_norm: str | None = None


@dataclass(frozen=True, kw_only=True)
class Format(Mixture):
    """A class that is a place for our weights, too.

    Attributes:
        holds: features that it computes as we do. needs: those that it cannot do without.
        fields: our configuration → its own.
        misread: engine → feature → why that engine would compute something else.
    """

    holds: frozenset[str]
    needs: frozenset[str]
    fields: Callable[[Fields], dict[str, Any]]
    misread: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def obstacle(self, config: Fields, engine: str) -> str | None:
        """Why this configuration cannot go there; None when it can."""
        used = {name for name, uses in FEATURES.items() if uses(config)}
        if lost := sorted(used - self.holds):
            return f"{self.architecture} has no place for: {', '.join(lost)}"
        if missing := sorted(self.needs - used):
            return f"{self.architecture} always has, and this model has not: {', '.join(missing)}"
        for name, reason in self.misread.get(engine, {}).items():
            if name in used:
                return f"{engine} would misread {name} in {self.architecture}: {reason}"
        return None


ENGINES = ("transformers", "vllm", "sglang")
_DEEPSEEK_SERVERS = {
    "grouped-query attention": "the constant that undoes the latent's norm is a bias, and it leaves biases out (a "
    "calibrated norm does without)",
    "frequencies that repeat or are left out": "they need a table, and it reads every scaled rope as yarn",
    "query or key bias": "it leaves the attention's biases out",
    "output bias": "it leaves the attention's biases out",
    "query bottleneck without norm": "the constant that undoes the norm is a bias, and it leaves biases out",
    "rope scaling other than yarn": "it reads every scaled rope as yarn",
    "norm epsilon other than 1e-6": "it takes rms_norm_eps for the latent's norm too, Transformers 1e-6",
}
FORMATS = {
    row.model_type: row
    for row in (
        Format(
            "mixtral",
            "MixtralForCausalLM",
            holds=frozenset(
                {
                    "grouped-query attention",
                    "several rotary keys",
                    "frequencies that repeat or are left out",
                    "head size of its own",
                    "sliding window",
                    "rope scaling other than yarn",
                    "rope that changes with the length",
                    "norm epsilon other than 1e-6",
                    "no shared experts",
                    "softmax router",
                    "softmax router of experts that differ",
                }
            ),
            needs=frozenset({"grouped-query attention", "softmax router"}),
            fields=_mixtral,
            block="block_sparse_moe",
            experts={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        ),
        Format(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qk_norm="head",
            holds=frozenset(
                {
                    "grouped-query attention",
                    "norms a query and key head",
                    "several rotary keys",
                    "frequencies that repeat or are left out",
                    "head size of its own",
                    "rope scaling other than yarn",
                    "rope that changes with the length",
                    "norm epsilon other than 1e-6",
                    "dense layers",
                    "dense layers behind sparse ones",
                    "no shared experts",
                    "softmax router",
                    "softmax router of experts that differ",
                    "weights that are not normalised",
                }
            ),
            needs=frozenset({"grouped-query attention", "norms a query and key head", "softmax router"}),
            fields=_qwen3_moe,
        ),
        Format(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            latent=True,
            holds=frozenset(
                {
                    "grouped-query attention",
                    "latents behind a norm",
                    "several rotary keys",
                    "several rotary keys beside a normed latent",
                    "position-free keys in a latent without norm",
                    "latent widths that differ by layer",
                    "rotary frequencies by layer",
                    "frequencies that repeat or are left out",
                    "query or key bias",
                    "output bias",
                    "head size of its own",
                    "rope on neighbouring pairs",
                    "rope scaling other than yarn",
                    "explicit softmax scale",
                    "norm epsilon other than 1e-6",
                    "query bottleneck without norm",
                    "dense layers",
                    "no layer with experts",
                    "shared experts",
                    "no shared experts",
                    "softmax router",
                    "sigmoid router",
                    "selection bias",
                    "weights that are not normalised",
                    "routed scaling factor",
                }
            ),
            needs=frozenset(),
            fields=_deepseek_v3,
            misread={"vllm": _DEEPSEEK_SERVERS, "sglang": _DEEPSEEK_SERVERS},
        ),
    )
}


# Those that come in, but do not go out: a bias of values has become one of the output.
MIXTURES: dict[str, Mixture] = {
    **FORMATS,
    "qwen2_moe": Mixture("qwen2_moe", "Qwen2MoeForCausalLM", shared="shared_expert"),
    "olmoe": Mixture("olmoe", "OlmoeForCausalLM", qk_norm="projection"),
}


def format_of(name: str) -> Format:
    """The row of that name.

    Raises:
        ValueError: unknown; the known ones are listed.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def matrix() -> list[list[str]]:
    """The table of features by format; for help and README.

    A cell is "needed" or "yes" for every engine, the engines that read it right where others would not, or "-".
    """
    rows = [["feature", *FORMATS]]
    for feature in FEATURES:
        rows.append([feature, *(_cell(feature, layout) for layout in FORMATS.values())])
    return rows


def _cell(feature: str, layout: Format) -> str:
    if feature not in layout.holds:
        return "-"
    right = [engine for engine in ENGINES if feature not in layout.misread.get(engine, {})]
    if len(right) < len(ENGINES):
        return ", ".join(right)
    return "needed" if feature in layout.needs else "yes"


def misreadings() -> list[str]:
    """Sentences of what `obstacle` refuses for an engine's sake, those of several engines together."""
    engines: dict[str, list[str]] = {}
    for layout in FORMATS.values():
        for engine, reasons in layout.misread.items():
            for feature, reason in reasons.items():
                engines.setdefault(f"{feature} in {layout.model_type}: {reason}", []).append(engine)
    return [f"{', '.join(names)}: {sentence}" for sentence, names in engines.items()]
