"""Configurations of other latent-attention mixtures, read as this model's: DeepSeek-V2 and V3, Kimi-K2, GLM-4-MoE-Lite.

Their tensors carry the names of this model already; only the configuration says things in other words.
"""

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# The class of Transformers that fills in each one's defaults and says what its options mean.
READ_AS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "glm4_moe_lite": "glm4_moe_lite",
}
# Options that mean the same there and here.
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "use_cache", "dtype", "num_attention_heads"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type", "rope_parameters"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_dropout"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor"),
    "output_router_logits",
)
# About the file and not the model.
DROPPED = ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config")


def translate(source: dict[str, Any]) -> dict[str, Any]:
    """This model's configuration of a source's, both as dictionaries of JSON.

    Raises:
        ValueError: a model type or an option that this model has no equal of.
    """
    model_type = source.get("model_type")
    if model_type not in READ_AS:
        known = ", ".join(READ_AS)
        raise ValueError(f"model_type={model_type!r} is no hf_moe checkpoint, nor one that loads as such ({known})")
    theirs = CONFIG_MAPPING[READ_AS[model_type]](**{k: v for k, v in source.items() if k not in DROPPED})

    def option(name: str, default: Any) -> Any:
        value = getattr(theirs, name, None)
        return default if value is None else value

    result = {name: getattr(theirs, name) for name in SAME if hasattr(theirs, name)}
    bias = option("attention_bias", False)
    result |= {
        "num_key_value_heads": 1,
        "rope_interleave": option("rope_interleave", True),
        "n_shared_experts": source.get("n_shared_experts", theirs.n_shared_experts) or 0,
        "n_group": option("n_group", 1),
        "topk_group": option("topk_group", 1),
        "num_nextn_predict_layers": source.get("num_nextn_predict_layers", source.get("num_mtp_layers", 0)),
        # A full query projection has a bias in none of their classes.
        "q_bias": bias and theirs.q_lora_rank is not None,
        "kv_bias": bias,
        "o_bias": bias,
        "mlp_layer_types": _mlp_layer_types(theirs),
        "router_aux_loss_coef": 0.0 if option("seq_aux", False) else option("aux_loss_alpha", 0.0),
        "router_seq_aux_loss_coef": option("aux_loss_alpha", 0.0) if option("seq_aux", False) else 0.0,
    }
    if model_type == "deepseek_v2":
        result |= {"scoring_func": "softmax", "topk_method": theirs.topk_method, "norm_topk_prob": False}
    else:
        result |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": theirs.norm_topk_prob}
    unlike = {
        "mlp_bias": (option("mlp_bias", False), False),
        "partial_rotary_factor": ((theirs.rope_parameters or {}).get("partial_rotary_factor", 1.0), 1.0),
        "scoring_func": (option("scoring_func", result["scoring_func"]), result["scoring_func"]),
        "topk_method": (option("topk_method", result["topk_method"]), result["topk_method"]),
        "norm_topk_prob": (option("norm_topk_prob", result["norm_topk_prob"]), result["norm_topk_prob"]),
    }
    for name, (found, needed) in unlike.items():
        if found != needed:
            raise ValueError(f"{name}={found!r} of a {model_type} checkpoint has no equal here, only {needed!r}")
    if "quantization_config" in source:
        result["quantization_config"] = _loadable(source["quantization_config"])
    return result


def _loadable(quantization: dict[str, Any]) -> dict[str, Any]:
    if quantization.get("quant_method") != "fp8":
        return dict(quantization)
    # Here and not above: it builds on inner parts of Transformers, whose renaming shall cost this feature only.
    try:
        from .fp8_hf_moe import dequantising
    except ImportError as error:
        raise ImportError(
            f"an FP8 checkpoint needs a part that Transformers {transformers.__version__} lacks ({error}); "
            "load one in bfloat16, or try another version of Transformers"
        ) from error
    return dequantising(quantization)


def _mlp_layer_types(theirs: Any) -> list[str]:
    if (types := getattr(theirs, "mlp_layer_types", None)) is not None:
        return types
    first, every = theirs.first_k_dense_replace or 0, getattr(theirs, "moe_layer_freq", 1)
    return ["sparse" if i >= first and i % every == 0 else "dense" for i in range(theirs.num_hidden_layers)]
