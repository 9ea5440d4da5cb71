"""Our expert layer under the name "hf_moe_triton", for every mixture-of-experts model in Transformers.

Triton is imported at the first call that can use it; importing this module registers nothing and asks no device.
"""

import os
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import activations as hf_activations
from transformers.integrations import moe as hf_moe_integration
from transformers.utils import logging

from . import stand_ins

if TYPE_CHECKING:
    from .gating import Gating

NAME = "hf_moe_triton"

Model = TypeVar("Model", bound=nn.Module)

logger = logging.get_logger(__name__)

# The exact classes (and plain functions) whose formula our kernels know, and its name and parameter there.
_ACTIVATIONS: dict[Any, tuple[str, float]] = {
    nn.SiLU: ("swish", 1.0),
    hf_activations.SiLUActivation: ("swish", 1.0),
    nn.functional.silu: ("swish", 1.0),
    hf_activations.QuickGELUActivation: ("swish", 1.702),
    hf_activations.GELUActivation: ("gelu", 1.0),
    hf_activations.GELUTanh: ("gelu_tanh", 1.0),
    hf_activations.NewGELUActivation: ("gelu_tanh", 1.0),
    hf_activations.FastGELUActivation: ("gelu_tanh", 1.0),
    nn.functional.gelu: ("gelu", 1.0),
    nn.ReLU: ("relu", 1.0),
    nn.functional.relu: ("relu", 1.0),
    hf_activations.ReLUSquaredActivation: ("relu2", 1.0),
}

# Experts of Transformers with a gate of their own: the class, then the attributes that hold its numbers.
_GATES: dict[str, dict[str, Any]] = {
    "beam.modeling_beam.BeamExperts": {},
    "gpt_oss.modeling_gpt_oss.GptOssExperts": {
        "alpha": "alpha",
        "limit": "limit",
        "up_offset": 1.0,
        "interleaved": True,
    },
    "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": {
        "alpha": "alpha",
        "limit": "limit",
        "up_offset": 1.0,
    },
    "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": {
        "alpha": "swiglu_alpha",
        "limit": "swiglu_limit",
        "up_offset": 1.0,
    },
    "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts": {"limit": "limit"},
    "glm5_next.modeling_glm5_next.Glm5NextTextExperts": {"limit": "swiglu_limit"},
    "hy_v4.modeling_hy_v4.HYV4Experts": {"limit": "swiglu_limit"},
}


def known_activation(act_fn: Any) -> tuple[str, float] | None:
    if type(act_fn) is nn.GELU:
        return ("gelu" if act_fn.approximate == "none" else "gelu_tanh"), 1.0
    return _ACTIVATIONS.get(type(act_fn)) or (_ACTIVATIONS.get(act_fn) if not isinstance(act_fn, nn.Module) else None)


def gating_of(module: Any) -> "Gating | None":
    """The formula between a module's two projections, or None when it is not one that the kernels know."""
    from .gating import Gating

    known = known_activation(getattr(module, "act_fn", None))
    if not module.has_gate:
        return None if known is None else Gating(known[0], known[1], gated=False)
    method = type(module)._apply_gate
    if method is hf_moe_integration._default_apply_gate:
        # That gate reads [gate; up]. A class that says otherwise is believed through its own gate, unfused.
        return None if known is None or not module.is_concatenated else Gating(*known)
    # By class name: a subclass may have a gate of its own, and Dynamo misreads the name of a method.
    where = (type(module).__module__ + "." + type(module).__name__).removeprefix("transformers.models.")
    numbers = _GATES.get(where)
    if numbers is None:
        return None
    if not hasattr(module, "act_fn"):
        known = "swish", getattr(module, numbers["alpha"]) if "alpha" in numbers else 1.0
    if known is None:
        return None
    return Gating(
        act=known[0],
        alpha=known[1],
        limit=getattr(module, numbers["limit"]) if "limit" in numbers else None,
        up_offset=numbers.get("up_offset", 0.0),
        interleaved=numbers.get("interleaved", False),
    )


def reason_to_fall_back(module: Any, hidden_states: torch.Tensor) -> str | None:
    """Why the kernels cannot compute this module on these tokens, as the end of a sentence; None when they can."""
    if hidden_states.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"its tensors are on {hidden_states.device.type!r}, and Triton needs a GPU"
    if hidden_states.device.type != "cuda" and module.down_proj.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    if module.has_post_expert_norm:
        return "it normalises each expert's output (has_post_expert_norm)"
    if module.down_proj.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weights are {module.down_proj.dtype}, and the kernels take float32, bfloat16 and float16"
    return None


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function that Transformers calls under the name "hf_moe_triton".

        out[t] = Σ_k weights[t, k] · (down[e] @ gate(up[e] @ x[t] + up_bias[e]) + down_bias[e])      e = index[t, k]

    Args:
        self: an experts module of Transformers (`@use_experts_implementation`). Its flags count: is_transposed,
            is_concatenated, has_bias, has_gate, and a gate of its own; a gate or activation that the kernels do not
            know runs between two grouped products. Without a GPU, or with has_post_expert_norm, the call goes to
            Transformers' "grouped_mm" (in fp64 "batched_mm"), and the reason is logged: once as a warning on a GPU, as
            information elsewhere.
        hidden_states: (T, D). Under autocast everything is cast to its dtype, otherwise to the weights' dtype.
        top_k_index: (T, K). An id that is no expert's (an expert-parallel sentinel) adds exactly zero.
        top_k_weights: (T, K), any float dtype.
    Returns:
        (T, D) in hidden_states' dtype.
    Gradients: hidden_states, top_k_weights, and every weight and bias that is not frozen.
    """
    reason = reason_to_fall_back(self, hidden_states)
    if reason is not None:
        # torch has no grouped product in fp64.
        name = "batched_mm" if self.down_proj.dtype == torch.float64 else "grouped_mm"
        # Without a GPU this is the rule and no news; and logging would break a graph that is being compiled.
        if not torch.compiler.is_compiling():
            say = logger.warning_once if hidden_states.device.type == "cuda" else logger.info
            say(f"{NAME}: {type(self).__name__} runs with {name}, because {reason}.")
        fallback = hf_moe_integration.ALL_EXPERTS_FUNCTIONS[name]
        return fallback(self, hidden_states, top_k_index, top_k_weights)
    from . import any_gate, layer

    name = "gate_up_proj" if self.has_gate else "up_proj"
    names = (name, "down_proj", *((f"{name}_bias", "down_proj_bias") if self.has_bias else ()))
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.down_proj.dtype
    x, up, down, *biases = (t.to(dtype) for t in (hidden_states, *(getattr(self, name) for name in names)))
    up_bias, down_bias = biases or (None, None)
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    gating = gating_of(self)
    if gating is None:
        gate = self._apply_gate if self.has_gate else self.act_fn
        out = any_gate.experts_with_gate(x, top_k_index, top_k_weights, up, down, up_bias, down_bias, gate=gate)
    else:
        recompute = getattr(self, "hf_moe_recompute", False)
        out = layer.experts(
            x, top_k_index, top_k_weights, up, down, up_bias, down_bias, gating=gating, recompute=recompute
        )
    return out.to(hidden_states.dtype)


def is_experts(module: nn.Module) -> bool:
    """Whether Transformers can switch this module's implementation: fused experts."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_post_expert_norm")


def register() -> None:
    """Make "hf_moe_triton" known to Transformers, whose own entries stay."""
    hf_moe_integration.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def accelerate(model: Model, *, recompute: bool = False) -> Model:
    """Switch a loaded mixture-of-experts model of Transformers to these kernels, in place.

    Its experts, its root-mean-square norms and, if it is a causal language model, its loss: the same numbers, without
    the copies in fp32 that autograd keeps. A norm with another formula, a hook or a forward of its own stays as it is,
    as does a loss that was set by hand. `torch.compile` sees norms and loss as Transformers wrote them.

    Args:
        model: a `PreTrainedModel` with experts, or a module that holds one (a peft or compiled wrapper).
        recompute: keep only the experts' input for the backward and run the first projection again there: less memory,
            and 22 of its operations for every 18.
    Returns:
        model itself; its weights are untouched, and `restore` undoes it.
    Raises:
        ValueError: the model has no experts that Transformers can switch.
    """
    register()
    experts: list[Any] = [m for m in model.modules() if is_experts(m)]
    hosts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not experts or not hosts:
        raise ValueError(
            f"{type(model).__name__} has {len(experts)} expert modules in {len(hosts)} Transformers models: "
            "both must be at least 1 for there to be something to accelerate"
        )
    for host in hosts:
        if host._can_set_experts_implementation() and host.config._experts_implementation != NAME:
            host.hf_moe_before = host.config._experts_implementation
            host.set_experts_implementation(NAME)
    stuck = {type(m).__name__ for m in experts if m.config._experts_implementation != NAME}
    if stuck:
        raise ValueError(
            f"Transformers cannot switch the experts of {type(model).__name__}: {', '.join(sorted(stuck))}"
        )
    for module in experts:
        module.hf_moe_recompute = recompute
    stand_ins.stand_in(model)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: experts, norms and loss are what they were.

    Returns:
        model itself, also when it never was accelerated.
    """
    stand_ins.step_back(model)
    for module in model.modules():
        module.__dict__.pop("hf_moe_recompute", None)
        if isinstance(module, PreTrainedModel) and (before := module.__dict__.pop("hf_moe_before", None)):
            module.set_experts_implementation(before)
    return model
