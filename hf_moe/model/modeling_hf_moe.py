"""The model: experts, mixture block, decoder layer, base model and heads.

Letters: B batch, S query length, T tokens (B·S), D hidden, F expert width, E experts, K experts a token, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_hf_moe import HfMoeAttention, HfMoeRMSNorm, add_and_norm
from .batching_hf_moe import LatentBatching
from .configuration_hf_moe import HfMoeConfig
from .fused_hf_moe import FUSED, fused, is_bare
from .generation_hf_moe import CapturedGeneration
from .parallel_hf_moe import register_parallel_styles
from .rotary_hf_moe import HfMoeRotaryEmbedding
from .routing_hf_moe import HfMoeTopkRouter, auxiliary_loss, target_share

# On disk experts are separate (`experts.3.gate_proj.weight`), as every engine reads them; in memory they are fused.
register_checkpoint_conversion_mapping(
    HfMoeConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)
register_parallel_styles()


class HfMoeMLP(nn.Module):
    """down(act(gate(x)) · up(x)), and what is to be added to it. Source: arXiv:2002.05202."""

    def __init__(self, config: HfMoeConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if all(is_bare(layer) for layer in layers):
            weights = [layer.weight for layer in layers]
            if (kernel := fused("gated_mlp", hidden_states, *weights, added)) is not None:
                output = kernel(hidden_states, *weights, self.act_fn, added)
                if output is not None:
                    return output
        output = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return output if added is None else added + output


@use_experts_implementation
class HfMoeExperts(nn.Module):
    """E gated MLPs as two fused tensors: `gate_up_proj` (E, 2F, D), gate rows first, and `down_proj` (E, D, F).

        y[t] = Σ_k weights[t, k] · mlp_{index[t, k]}(x[t])

    `experts_implementation` chooses the kernel; the loop below is its "eager" form. An index of E or above marks a
    row that another rank computes.
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_load_state_dict_pre_hook(_fuse_saved_experts)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output = output.index_add(0, token, y * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"


def _fuse_saved_experts(module: Any, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Let `load_state_dict` take a saved file's separate experts, all or those of one shard.

    Trainer resumes so: it does not convert names, and goes on with a warning and the weights that it began with.
    """
    if isinstance(module.down_proj, DTensor):
        return
    gate, up = slice(module.intermediate_dim), slice(module.intermediate_dim, None)
    for whole, parts in (
        ("gate_up_proj", {"gate_proj": gate, "up_proj": up}),
        ("down_proj", {"down_proj": slice(None)}),
    ):
        names = [
            (e, rows, f"{prefix}{e}.{part}.weight") for e in range(module.num_experts) for part, rows in parts.items()
        ]
        found = [(expert, rows, state_dict.pop(name)) for expert, rows, name in names if name in state_dict]
        held = getattr(module, whole).detach()
        # What a module on the meta device lacks stays missing.
        if not found or (held.is_meta and len(found) < len(names)):
            continue
        first = found[0][2]
        fused = torch.empty_like(held, device=first.device, dtype=first.dtype) if held.is_meta else held.clone()
        for expert, rows, weight in found:
            fused[expert, rows].copy_(weight)
        state_dict[prefix + whole] = fused


class HfMoeSparseMoeBlock(nn.Module):
    """Routed experts, plus the shared expert that every token passes. Source: arXiv:2401.06066."""

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.gate = HfMoeTopkRouter(config)
        self.experts = HfMoeExperts(config)
        self.shared_experts = HfMoeMLP(config, config.shared_width) if config.shared_width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(x_TD)
        output = self.experts(x_TD, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is None:
            return output
        if self.shared_expert_gate is None:
            return self.shared_experts(hidden_states, output)
        return output + self.shared_experts(hidden_states) * self.shared_expert_gate(hidden_states).sigmoid()


class HfMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then an MLP or a mixture, each in a residual branch with its norms before, after or around it."""

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HfMoeAttention(config, layer_idx)
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp: nn.Module = HfMoeSparseMoeBlock(config)
        else:
            self.mlp = HfMoeMLP(config, config.intermediate_size)
        self.norm_placement = config.norm_placement
        # Names are those of Llama, OLMo 2 and Gemma: with "pre", post_attention_layernorm stands before the MLP.
        names = {
            "pre": ["input_layernorm", "post_attention_layernorm"],
            "post": ["post_attention_layernorm", "post_feedforward_layernorm"],
            "sandwich": [
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ],
        }
        for name in names[config.norm_placement]:
            self.add_module(name, HfMoeRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        pre, post = self.norm_placement != "post", self.norm_placement != "pre"

        branch = self.input_layernorm(hidden_states) if pre else hidden_states
        branch, _ = self.self_attn(
            branch,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **kwargs,
        )
        if post:
            branch = self.post_attention_layernorm(branch)
        if pre:
            norm = self.pre_feedforward_layernorm if post else self.post_attention_layernorm
            hidden_states, branch = add_and_norm(norm, hidden_states, branch)
        else:
            hidden_states = branch = hidden_states + branch
        branch = self.mlp(branch)
        return hidden_states + (self.post_feedforward_layernorm(branch) if post else branch)


class HfMoePreTrainedModel(PreTrainedModel):
    """What Transformers asks of every class below: flags, recorders, initialisation."""

    config: HfMoeConfig
    config_class = HfMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HfMoeDecoderLayer,
        "attentions": HfMoeAttention,
        "router_logits": OutputRecorder(HfMoeTopkRouter, index=0),
    }

    def __init__(self, config: HfMoeConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.topk_method == "noaux_tc" and "sparse" in config.mlp_layer_types:
            self._keep_in_fp32_modules_strict = {"e_score_correction_bias"}
        # Layers for multi-token prediction stand behind the last one in the checkpoint.
        layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self._keys_to_ignore_on_load_unexpected = {rf"(^|\.)layers\.{layer}\." for layer in layers}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As Transformers' own, but a checkpoint that does not fit is an error and not a model with random weights.

        A new head (`score`, `qa_outputs`) may be missing, and another's may be left over.

        Raises:
            RuntimeError: names of missing, unexpected or wrong-shaped tensors. Not with `output_loading_info`, which
                hands them to the caller; wrong shapes not with `ignore_mismatched_sizes`.
        """
        model, found = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        wrong = [f"{name} {tuple(shape)}, not {tuple(own)}" for name, shape, own in found["mismatched_keys"]]
        if wrong and not ignore_mismatched_sizes:
            raise RuntimeError(f"{pretrained_model_name_or_path} has tensors of another shape: {_some_of(wrong)}")
        if output_loading_info:
            return model, found
        if pretrained_model_name_or_path is not None:
            wrong_shape = {name for name, _, _ in found["mismatched_keys"]}
            new_heads = ("score.", "qa_outputs.")
            for kind, names, may_differ in (
                ("lacks", found["missing_keys"] - wrong_shape, new_heads),
                (
                    "has tensors that the configuration has no place for:",
                    found["unexpected_keys"],
                    (*new_heads, "lm_head."),
                ),
            ):
                if names := [name for name in names if not name.startswith(may_differ)]:
                    raise RuntimeError(f"{pretrained_model_name_or_path} {kind} {_some_of(names)}")
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As Transformers' own; the layers for multi-token prediction are not held, so the saved folder names none."""
        layers, self.config.num_nextn_predict_layers = self.config.num_nextn_predict_layers, 0
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config.num_nextn_predict_layers = layers

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        if loading_info.conversion_errors:
            folder, found = load_config.pretrained_model_name_or_path, loading_info.conversion_errors
            names = _some_of(list(found))
            if all(".experts." in name for name in found):
                raise RuntimeError(f"{folder} lacks experts, or has them in different shapes, for {names}")
            # The exception's own words, between its traceback and where it was raised.
            reason = next(text for name, text in found.items() if ".experts." not in name).splitlines()[-2:][0]
            raise RuntimeError(f"{folder} could not be loaded: {reason} ({names})")
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if not isinstance(module, HfMoeRotaryEmbedding):
            super()._init_weights(module)
        if isinstance(module, HfMoeTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if hasattr(module, "e_score_correction_bias"):
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, HfMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, HfMoeAttention) and module.sinks is not None:
            init.normal_(module.sinks, mean=0.0, std=std)
        elif isinstance(module, HfMoeRotaryEmbedding):
            for layer_type in module.layer_types:
                inv_freq, _ = module.compute_frequencies(layer_type)
                for name in ("inv_freq", "original_inv_freq"):
                    init.copy_(getattr(module, module._prefix(layer_type) + name), inv_freq)
            if self.config.rope_frequencies is not None:
                init.copy_(module.chosen, module.compute_chosen())

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Where the `hf_moe` package has registered its kernels, they are the default."""
        if requested_experts is None and "hf_moe_triton" in ALL_EXPERTS_FUNCTIONS:
            requested_experts = "hf_moe_triton"
        return super().get_correct_experts_implementation(requested_experts)


def _some_of(names: list[str]) -> str:
    """The first eight in order, and how many more."""
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class HfMoeModel(HfMoePreTrainedModel):
    """Embedding, decoder layers, final norm: token ids (B, S) to hidden states (B, S, D)."""

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(HfMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HfMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = HfMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Arguments and result are those of every decoder of Transformers.

        Raises:
            ValueError: a trainer asks for router logits without the head, to compute Mixtral's loss of them, and this
                router is not Mixtral's or has more losses (TRL's SFTTrainer does so).
        """
        wants_logits = self.training and kwargs.get("output_router_logits") and self.config.router_aux_loss_coef
        if not kwargs.pop("from_own_head", False) and wants_logits:
            router: list[str] = [self.config.scoring_func, self.config.topk_method]
            router += ["topk_each_group"] if self.config.topk_each_group else []
            if router != ["softmax", "greedy"]:
                raise ValueError(
                    f"router_aux_loss_coef={self.config.router_aux_loss_coef} outside of {type(self).__name__}'s own "
                    f"head would be that of a greedy softmax router, and this one is {' '.join(router)}: set it to 0"
                )
            for name in ("router_seq_aux_loss_coef", "router_z_loss_coef"):
                if value := getattr(self.config, name):
                    raise ValueError(
                        f"{name}={value} would be left out: only {type(self).__name__}'s own head adds it; set it to 0"
                    )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # Of what the caller gave: without a cache, positions that begin again tell packed texts apart.
        masks = self._attention_masks(inputs_embeds, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        hidden_states = inputs_embeds * self.config.embedding_multiplier
        tables = {
            layer_type: self.rotary_emb(hidden_states, position_ids, layer_type)
            for layer_type in self.rotary_emb.layer_types
        }
        ropes = self.rotary_emb.of_layers(tables)
        # `generate(assistant_early_exit=…)` drafts with fewer layers.
        layer_types = self.config.layer_types[: self.config.num_hidden_layers]
        for layer, layer_type, rope in zip(self.layers, layer_types, ropes, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=rope,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def routers(self) -> list[HfMoeTopkRouter]:
        """The router of each sparse layer, in order."""
        # By their place: peft keeps the original of what it trains beside it, and wraps it or the block around it.
        found = [getattr(getattr(layer, "mlp", None), "gate", None) for layer in self.layers]
        return [getattr(gate, "get_base_layer", lambda gate=gate: gate)() for gate in found if gate is not None]

    def _attention_masks(self, inputs_embeds, attention_mask, position_ids, past_key_values) -> dict[str, Any]:
        if isinstance(attention_mask, dict):  # `generate` prepared them
            return attention_mask
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            layer_type: create[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer_type in sorted(set(self.config.layer_types))
        }


class HfMoeForCausalLM(CapturedGeneration, LatentBatching, HfMoePreTrainedModel, GenerationMixin):
    """Language model: `HfMoeModel` and a linear head, with the router's losses added in training."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.model = HfMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, S, V), and with labels the loss.

            loss = cross-entropy + auxiliary_loss · (this batch's target tokens / num_items_in_batch)

        The auxiliary part is added in training mode only. `num_items_in_batch`, which Trainer passes, counts the target
        tokens of all micro-batches and processes: with the share an optimizer step sees the mean of the micro-batches'
        auxiliary losses, weighted by tokens, and not their sum. (The load of each micro-batch is balanced by itself.)

        Raises:
            ValueError: the router trains, but reentrant checkpointing cut its losses off, or Trainer computes the loss.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        # Trainer passes both, unless something else computes the loss from the logits.
        is_without_labels = labels is None and kwargs.get("num_items_in_batch") is not None
        if is_without_labels and self.training and self._has_auxiliary_loss():
            raise ValueError(
                "label smoothing, or a loss function of your own, takes the labels away, and the router's losses with "
                "them; set the router's loss coefficients to 0 to train without these"
            )
        add_auxiliary = labels is not None and self.training and self._has_auxiliary_loss()
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or add_auxiliary,
            from_own_head=True,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states) / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap

        loss = aux_loss = None
        if labels is not None:
            loss_function = self.loss_function
            if loss_function is ForCausalLMLoss:
                loss_function = FUSED.get("causal_lm_loss", loss_function)
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if outputs.router_logits and (add_auxiliary or output_router_logits):
            routers, batch_size = self.model.routers(), outputs.last_hidden_state.shape[0]
            aux_loss = auxiliary_loss(self.config, routers, outputs.router_logits, batch_size, attention_mask)
            if labels is not None and add_auxiliary:
                if torch.is_grad_enabled() and routers[0].weight.requires_grad and not aux_loss.requires_grad:
                    raise ValueError(
                        "the router's losses get no gradient under reentrant checkpointing; use "
                        "gradient_checkpointing_kwargs={'use_reentrant': False}"
                    )
                share = target_share(labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"))
                loss = loss + (aux_loss * share).to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _has_auxiliary_loss(self) -> bool:
        config = self.config
        coefficients = config.router_aux_loss_coef, config.router_seq_aux_loss_coef, config.router_z_loss_coef
        return any(coefficients) and "sparse" in config.mlp_layer_types


class _HfMoeHead(HfMoePreTrainedModel):
    """Holds the base model directly: Transformers' generic heads look it up in AutoModel, which remote code lacks.

    The router's losses are the language model's: training with another head adds none.
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.model = HfMoeModel(config)
        self._add_head(config)
        self.post_init()


class HfMoeForSequenceClassification(GenericForSequenceClassification, _HfMoeHead):
    """A score for each label from the last token that is not padding."""

    def __init__(self, config: HfMoeConfig):
        _HfMoeHead.__init__(self, config)

    def _add_head(self, config: HfMoeConfig) -> None:
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class HfMoeForTokenClassification(GenericForTokenClassification, _HfMoeHead):
    """A score for each label from each token."""

    def __init__(self, config: HfMoeConfig):
        _HfMoeHead.__init__(self, config)

    def _add_head(self, config: HfMoeConfig) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class HfMoeForQuestionAnswering(GenericForQuestionAnswering, _HfMoeHead):
    """Start and end scores of the answer span from each token."""

    def __init__(self, config: HfMoeConfig):
        _HfMoeHead.__init__(self, config)

    def _add_head(self, config: HfMoeConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


HfMoeModel.register_for_auto_class("AutoModel")
HfMoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
HfMoeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
HfMoeForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
HfMoeForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

__all__ = [
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "HfMoePreTrainedModel",
]
