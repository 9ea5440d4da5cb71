"""Every hyper-parameter of the latent-attention mixture of experts, its validation and its parallel plans.

Letters: D hidden, F expert width, E experts, K experts a token, H heads, G key groups, C latent width, P rotary width.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .translation_hf_moe import translate

# What the Hub needs to find the classes in the files that `save_pretrained` copies beside the weights.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_moe.HfMoeConfig",
    "AutoModel": "modeling_hf_moe.HfMoeModel",
    "AutoModelForCausalLM": "modeling_hf_moe.HfMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hf_moe.HfMoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hf_moe.HfMoeForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hf_moe.HfMoeForQuestionAnswering",
}

# What numbers may be, where they are not None.
AT_LEAST = {
    1: "vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings num_attention_heads "
    "num_key_value_heads q_lora_rank kv_lora_rank qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
    "moe_intermediate_size n_group topk_group sliding_window",
    0: "qk_nope_head_dim n_shared_experts shared_expert_intermediate_size num_nextn_predict_layers initializer_range "
    "rms_norm_eps latent_norm_eps router_aux_loss_coef router_seq_aux_loss_coef router_z_loss_coef",
}
ABOVE_ZERO = "softmax_scale attn_logit_softcapping final_logit_softcapping embedding_multiplier logits_scaling"


@strict
class HfMoeConfig(PreTrainedConfig):
    """Configuration of `HfMoeModel`: multi-head latent attention and a mixture of experts.

    Names are DeepSeek-V3's where DeepSeek has one. A GQA model is the special case `num_key_value_heads` = G of the
    source, `qk_rope_head_dim` = its head size, `qk_nope_head_dim` = 0, `kv_a_layernorm` = False.

    Attention:
        num_key_value_heads: G, rotary keys a token; each serves H/G query heads. 1 in DeepSeek's models.
        kv_lora_rank: C, width of the cached latent; the largest of `kv_lora_ranks`, one for each layer, if given.
        q_lora_rank: width of the query's low-rank bottleneck; None for a full projection.
        qk_rope_head_dim, qk_nope_head_dim: rotary and position-free part of a query or key head; the latter may be 0.
        rope_frequencies: for each layer the frequencies that its rotary pairs turn with, at most `qk_rope_head_dim`/2,
            as indices into the table of a head `rope_table_dim` wide; by default every pair has its own.
        v_head_dim: width of a value head.
        kv_a_layernorm, q_a_layernorm: RMS norm of the latent and of the query bottleneck, with `latent_norm_eps`.
        q_bias, kv_bias, o_bias: biases of the query, of the latent and rotary key, of the output projection.
        qk_norm: "head" normalises each query and key head (Qwen3), "projection" all of them at once (OLMo 2). Needs
            `qk_nope_head_dim` = 0, since a norm cannot be absorbed.
        softmax_scale: factor of the scores; None for (nope + rope)^-0.5, times yarn's mscale² where it applies.
        attn_logit_softcapping, final_logit_softcapping: x -> cap · tanh(x / cap) on scores and on logits.
        attention_sinks: one learned logit a head that takes part in the softmax and carries no value (gpt-oss).
        rope_parameters: Transformers' dictionary, or one for each layer type. rope_interleave: pairs (0, 1), (2, 3)…
        layer_types, sliding_window: "full_attention" or "sliding_attention" for each layer.
    Layers:
        norm_placement: "pre", "post" (OLMo 2) or "sandwich" (Gemma).
        embedding_multiplier, logits_scaling: h0 = multiplier · embedding; logits are divided by the scaling.
    Mixture:
        mlp_layer_types: "dense" or "sparse" for each layer. `first_k_dense_replace` is accepted to derive it.
        n_routed_experts, num_experts_per_tok, moe_intermediate_size: E, K, F.
        n_shared_experts: experts that every token passes, as one MLP of n·F, or of `shared_expert_intermediate_size`;
            `shared_expert_gate` weighs it by a sigmoid of the token (Qwen2-MoE).
        scoring_func: "softmax" or "sigmoid" of the router's logits, in fp32.
        topk_method: "greedy"; "group_limited_greedy" (best expert ranks a group, DeepSeek-V2); "noaux_tc" (the best two
            rank it, with a selection bias that is no part of the weight, DeepSeek-V3).
        n_group, topk_group: number of expert groups, and how many of them a token may use. With `topk_each_group` it
            uses all of them instead, K / n_group experts of each, and weights are normalised inside of a group.
        norm_topk_prob, routed_scaling_factor: weights are divided by their sum, then multiplied by the factor.
        router_aux_loss_coef, router_seq_aux_loss_coef, router_z_loss_coef: added to the training loss when above 0.
        num_nextn_predict_layers: layers behind the last one in the checkpoint's files, for multi-token prediction
            (DeepSeek-V3). They are no part of this model; `generate(use_mtp=True)` loads them as its drafter.

    Raises:
        ValueError: a combination that cannot be built, with the numbers that disagree.
    Source: arXiv:2405.04434 (latent attention, group-limited routing), arXiv:2412.19437 (selection bias).
    """

    model_type = "hf_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    num_attention_heads: int = 16
    num_key_value_heads: int = 1
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    kv_lora_ranks: list[int] | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    rope_table_dim: int | None = None
    rope_frequencies: list[list[int]] | None = None
    v_head_dim: int = 128
    kv_a_layernorm: bool = True
    q_a_layernorm: bool = True
    latent_norm_eps: float = 1e-6
    q_bias: bool = False
    kv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    softmax_scale: float | None = None
    attn_logit_softcapping: float | None = None
    attention_sinks: bool = False
    attention_dropout: float = 0.0
    rope_parameters: RopeParameters | dict | None = None
    rope_interleave: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None

    mlp_layer_types: list[str] | None = None
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    n_group: int = 1
    topk_group: int = 1
    topk_each_group: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_seq_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    num_nextn_predict_layers: int = 0

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The folder's config.json; that of a DeepSeek-V2, V3, Kimi-K2 or GLM-4-MoE-Lite folder is translated."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type", cls.model_type) != cls.model_type:
            config = translate(config)
        return config, kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if alias in kwargs and kwargs[alias] != given != default:
                raise ValueError(f"{alias}={kwargs[alias]} and {name}={given} are one option, and must be the same")
        first_k_dense_replace = kwargs.pop("first_k_dense_replace", 0)
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] * min(first_k_dense_replace, self.num_hidden_layers)
            self.mlp_layer_types += ["sparse"] * (self.num_hidden_layers - len(self.mlp_layer_types))
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        # Derived, and written to config.json because Transformers' rope and cache code read it there.
        kwargs.pop("head_dim", None)
        self.head_dim = self.rope_table_dim or self.qk_rope_head_dim
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """Tensor-parallel style of each module: heads and expert rows over the ranks, latents on all of them.

        Only rules that this configuration has a module for: Transformers warns of the others.
        """
        query = "q_proj" if self.q_lora_rank is None else "q_b_proj"
        attention = {
            # A norm over all heads needs them all; the attention's own style then keeps this rank's.
            query: "colwise_gather_output" if self.qk_norm == "projection" else "colwise",
            "kv_b_proj": "colwise",
            "o_proj": "rowwise",
        }
        if self.qk_norm == "head":
            attention["q_norm"] = "replicated_with_grad_allreduce"
        if self.attention_sinks:
            attention["sinks"] = "colwise"
        plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
        plan["layers.*.self_attn"] = "latent_attention_heads"
        if "sparse" in self.mlp_layer_types:
            plan |= {
                "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
                "layers.*.mlp.experts.down_proj": "rowwise",
                "layers.*.mlp.experts": "moe_tp_experts",
            }
        mlps = ["mlp"] if "dense" in self.mlp_layer_types else []
        mlps += ["mlp.shared_experts"] if self.shared_width and "sparse" in self.mlp_layer_types else []
        for mlp in mlps:
            plan |= {f"layers.*.{mlp}.{name}": "colwise" for name in ("gate_proj", "up_proj")}
            plan[f"layers.*.{mlp}.down_proj"] = "rowwise"
        return plan

    @property
    def mtp_layer_types(self) -> list[str]:
        """Attention of each multi-token prediction layer, which Transformers' drafter asks for."""
        return ["full_attention"] * self.num_nextn_predict_layers

    @property
    def mtp_mlp_layer_types(self) -> list[str]:
        """Every multi-token prediction layer is a mixture."""
        return ["sparse"] * self.num_nextn_predict_layers

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head and of an expanded key head; the widest layer's."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_widths(self) -> list[int]:
        """C of each layer."""
        return self.kv_lora_ranks or [self.kv_lora_rank] * self.num_hidden_layers

    @property
    def rotary_widths(self) -> list[int]:
        """P of each layer."""
        if self.rope_frequencies is None:
            return [self.qk_rope_head_dim] * self.num_hidden_layers
        return [2 * len(pairs) for pairs in self.rope_frequencies]

    @property
    def cache_widths(self) -> list[int]:
        """Numbers a token in the cache of each layer, C + G·P."""
        groups = self.num_key_value_heads
        return [c + groups * p for c, p in zip(self.latent_widths, self.rotary_widths, strict=True)]

    @property
    def shared_width(self) -> int:
        """Width of the shared expert's MLP; 0 without one."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size

    def validate_architecture(self) -> None:
        """Refuse what cannot be built; called by the strict dataclass after every construction."""
        self._validate_numbers()
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotation acts on pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.qk_norm is not None and self.qk_nope_head_dim:
            raise ValueError(
                f"qk_norm={self.qk_norm!r} needs qk_nope_head_dim=0, got {self.qk_nope_head_dim}: "
                "a norm of keys that come from the latent cannot be absorbed"
            )
        self._validate_layers()
        self._validate_widths()
        self._validate_rope()
        self._validate_routing()

    def _validate_numbers(self) -> None:
        for least, names in AT_LEAST.items():
            for name in names.split():
                if (value := getattr(self, name)) is not None and value < least:
                    raise ValueError(f"{name}={value} must be at least {least}")
        for name in ABOVE_ZERO.split():
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be at least 0 and below 1")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is no token of vocab_size={self.vocab_size}")

    def _validate_layers(self) -> None:
        for name in ("layer_types", "mlp_layer_types"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(getattr(self, name))} layers, num_hidden_layers={self.num_hidden_layers}"
                )
        if unknown := set(self.layer_types) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types may hold full_attention and sliding_attention, got {sorted(unknown)}")
        if unknown := set(self.mlp_layer_types) - {"dense", "sparse"}:
            raise ValueError(f"mlp_layer_types may hold dense and sparse, got {sorted(unknown)}")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError(f"layer_types has sliding_attention, but sliding_window={self.sliding_window}")

    def _validate_widths(self) -> None:
        """Latents and rotary pairs that differ from layer to layer."""
        for name in ("kv_lora_ranks", "rope_frequencies"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_hidden_layers:
                raise ValueError(f"{name} names {len(values)} layers, num_hidden_layers={self.num_hidden_layers}")
            if values is not None and self.num_nextn_predict_layers:
                raise ValueError(
                    f"{name} leaves out num_nextn_predict_layers={self.num_nextn_predict_layers}: layers for "
                    "multi-token prediction take the last layer's sizes"
                )
        for layer, rank in enumerate(self.kv_lora_ranks or []):
            if not 1 <= rank <= self.kv_lora_rank:
                raise ValueError(
                    f"kv_lora_ranks has {rank} in layer {layer}, not 1 to kv_lora_rank={self.kv_lora_rank}"
                )
        for layer, pairs in enumerate(self.rope_frequencies or []):
            if not 1 <= len(pairs) <= self.qk_rope_head_dim // 2:
                raise ValueError(
                    f"rope_frequencies has {len(pairs)} pairs in layer {layer}, not 1 to half of "
                    f"qk_rope_head_dim={self.qk_rope_head_dim}"
                )
            if not 0 <= min(pairs) <= max(pairs) < self.head_dim // 2:
                raise ValueError(
                    f"rope_frequencies has {min(pairs)} to {max(pairs)} in layer {layer}, a table of "
                    f"rope_table_dim={self.head_dim} holds 0 to {self.head_dim // 2 - 1}"
                )
        if self.rope_frequencies is None and self.head_dim != self.qk_rope_head_dim:
            raise ValueError(
                f"rope_table_dim={self.rope_table_dim} is not qk_rope_head_dim={self.qk_rope_head_dim}, and no "
                "rope_frequencies say which of it are used"
            )

    def _validate_rope(self) -> None:
        """Errors where Transformers only warns."""
        parameters: Any = self.rope_parameters
        by_layer_type = {key: value for key, value in parameters.items() if isinstance(value, dict)}
        if by_layer_type and (missing := set(self.layer_types) - set(by_layer_type)):
            raise ValueError(f"rope_parameters has {sorted(by_layer_type)} but not {sorted(missing)} of layer_types")
        for rope in by_layer_type.values() or [parameters]:
            rope_type, factor = rope.get("rope_type"), rope.get("factor")
            if rope["rope_theta"] <= 0:
                raise ValueError(f"rope_theta={rope['rope_theta']} of rope_type={rope_type!r} must be above 0")
            if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
                raise ValueError(f"rope_type={rope_type!r} is none of {['default', *ROPE_INIT_FUNCTIONS]}")
            if factor is not None and factor < 1:
                raise ValueError(f"factor={factor} of rope_type={rope_type!r} must be at least 1")
            pairs = self.head_dim // 2
            for name in ("short_factor", "long_factor"):
                if rope.get(name) is not None and len(rope[name]) != pairs:
                    raise ValueError(f"{name} has {len(rope[name])} numbers for qk_rope_head_dim={self.head_dim}")
            partial = rope.get("partial_rotary_factor", 1.0)
            if partial != 1.0 and rope_type != "proportional":
                raise ValueError(
                    f"partial_rotary_factor={partial}: all of qk_rope_head_dim={self.qk_rope_head_dim} rotates; what "
                    f"does not is qk_nope_head_dim={self.qk_nope_head_dim}"
                )

    def _validate_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} is not divisible by n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is above n_group={self.n_group}")
        reachable = self.n_routed_experts
        if self.topk_each_group:
            if self.topk_method == "group_limited_greedy":
                raise ValueError("topk_each_group=True takes every group, topk_method='group_limited_greedy' only some")
            if self.num_experts_per_tok % self.n_group:
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok} is not divisible by n_group={self.n_group}: "
                    "topk_each_group takes as many experts of every group"
                )
        elif self.topk_method != "greedy":
            reachable = reachable // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is above the {reachable} experts a token can reach "
                f"(n_routed_experts={self.n_routed_experts}, topk_group={self.topk_group} of n_group={self.n_group})"
            )
        ranked = self.topk_method == "noaux_tc" and not self.topk_each_group
        if ranked and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"noaux_tc ranks a group by its best two experts, but n_routed_experts={self.n_routed_experts} in "
                f"n_group={self.n_group} leaves one"
            )
        if self.shared_expert_gate and not self.shared_width:
            raise ValueError(
                "shared_expert_gate=True needs n_shared_experts or shared_expert_intermediate_size above 0"
            )


HfMoeConfig.register_for_auto_class()

__all__ = ["HfMoeConfig"]
