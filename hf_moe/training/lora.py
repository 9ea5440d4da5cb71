"""LoRA on experts with peft's calls and files, computed without summing weights, and presets of what to adapt.

    h = W[e] @ x + scaling · B[e] @ (A[e] @ dropout(x))          A (E·r, in) and B (out, r·E) as peft stores them

peft itself forms W + scaling · B @ A for every expert in every step, and the gradient of all of W.
"""

import copy
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import layer as peft_layer
from torch import nn

from ..kernels.adapters import Adapter, adapted_experts_forward
from ..kernels.experts import NAME, is_experts

Model = TypeVar("Model", bound=nn.Module)

PRESETS = ("attention", "experts", "all")


class ParamWrapper(peft_layer.ParamWrapper):
    """peft's wrapper of one parameter of an experts module, whose forward gives A and B to the grouped computation.

    Wrappers nest, one a parameter; the outermost gathers the adapters of all. Everything else is peft's: files,
    merging, several adapters, rank patterns. Its name is too, because peft knows a wrapper by it. Dropout, which peft
    refuses, acts on the input of A, one draw for each routed row.

    Where the model's experts are not "hf_moe_triton" or are themselves trained, peft's own forward runs. Experts that
    are split over processes are refused: the adapters would be whole on each of them.
    """

    def __init__(self, base_layer, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs) -> None:
        _refuse_split(base_layer)
        # Its own check comes before `update_layer`.
        super().__init__(base_layer, adapter_name, parameter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name: str, config: LoraConfig) -> None:
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def _adapters(self) -> list[Adapter]:
        if self.merged:
            return []
        return [
            Adapter(
                self.lora_A[name].weight.unflatten(0, (self.num_experts, -1)),
                self.lora_B[name].weight.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1),
                self.scaling[name],
                self.lora_dropout[name],
            )
            for name in self.active_adapters
            if name in self.lora_A
        ]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        experts, adapters, drops = self, {}, False
        while isinstance(experts, ParamWrapper):
            adapters[experts.parameter_name] = found = experts._adapters()
            drops = drops or any(adapter.drops for adapter in found)
            experts = experts.base_layer
        if self.disable_adapters or not any(adapters.values()):
            return super().forward(x, *args, **kwargs)
        if not _computes(experts):
            if drops:
                raise ValueError(
                    f"lora_dropout={self.lora_dropout} on experts needs experts_implementation={NAME!r} and frozen "
                    f"weights; this layer's is {_implementation(experts)!r}"
                )
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        return adapted_experts_forward(experts, x, *args, adapters=adapters, **kwargs)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def _refuse_split(module: Any) -> None:
    while isinstance(module, peft_layer.ParamWrapper):
        module = module.base_layer
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"LoRA on experts does not work under expert parallelism, and a process has {module.num_experts} of the "
            "experts here: load the model with ep_size=1, or take the preset 'attention'"
        )


def _implementation(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _computes(module: Any) -> bool:
    return (
        is_experts(module)
        and _implementation(module) == NAME
        and not module.has_post_expert_norm
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def use_grouped_lora(model: Model) -> Model:
    """Switch the expert adapters of a peft model to the grouped computation, in place.

    For adapters that peft made without `lora_config`: `PeftModel.from_pretrained`, or a plain LoraConfig with
    target_parameters. Parameters, names and files stay as they are.

    Raises:
        ValueError: the model has no adapter on an experts module, or its experts are split over processes.
    """
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, peft_layer.ParamWrapper) and is_experts(module.get_base_layer())
    ]
    if not wrappers:
        raise ValueError(f"{type(model).__name__} has no LoRA on experts: 0 modules with adapted expert parameters")
    for module in wrappers:
        _refuse_split(module)
        module.__class__ = ParamWrapper
    return model


def load_lora(model: nn.Module, folder: str | Path, **options: Any) -> PeftModel:
    """A saved adapter on the model that it was made for, experts in the grouped computation.

    `PeftModel.from_pretrained` and `use_grouped_lora`, and it also takes adapters that were trained with dropout on
    experts, which peft's own wrapper refuses.

    Args:
        model: as it was before `get_peft_model`.
        folder: what `save_pretrained` wrote, ours or peft's; or a Hub id.
        options: of `PeftModel.from_pretrained` (is_trainable, adapter_name, revision, …).
    """
    config = PeftConfig.from_pretrained(folder)
    _take_over(config, model)
    return PeftModel.from_pretrained(model, folder, config=config, **options)


def _take_over(config: LoraConfig, model: nn.Module) -> None:
    """Let our wrapper adapt the parameters of experts."""
    config._register_custom_module({type(module): ParamWrapper for module in model.modules() if is_experts(module)})


def lora_config(preset: str, *, model: nn.Module, **options: Any) -> LoraConfig:
    """A LoraConfig of peft for what a name says, found in the model; `get_peft_model(model, …)` then trains it.

    Args:
        preset: "attention": every linear layer of the attention blocks. "experts": both projections of the routed
            experts. "all": these two, shared experts and dense feed-forward layers. The router, the embeddings and the
            head stay frozen in each.
        model: the model to adapt; ours or Transformers', before peft.
        options: LoraConfig's (r, lora_alpha, lora_dropout, use_rslora, rank_pattern, …), but no targets.
    Raises:
        ValueError: there is no such preset, or the model has nothing that it names.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no LoRA preset {preset!r}: the {len(PRESETS)} presets are {', '.join(PRESETS)}")
    attention, other, parameters = set(), set(), set()
    for name, module in model.named_modules():
        where = re.split(r"\.\d+\.", f".{name}")[-1]
        if isinstance(module, nn.Linear) and where != f".{name}":
            if re.search(r"attn|attention", where):
                attention.add(where)
            elif not re.search(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)", where):
                other.add(where)
        elif is_experts(module):
            parameters |= {f"{where}.{key}" for key in ("gate_up_proj", "up_proj", "down_proj") if hasattr(module, key)}
    wanted = {
        "attention": [("linear layers below a module named *attn* or *attention*", attention)],
        "experts": [("fused experts that Transformers can switch", parameters)],
        "all": [
            ("linear layers below a module named *attn* or *attention*", attention),
            ("fused experts that Transformers can switch", parameters),
        ],
    }[preset]
    for what, found in wanted:
        if not found:
            raise ValueError(
                f"LoRA preset {preset!r} matches nothing in {type(model).__name__}: it looked for {what} "
                f"and found 0; the presets are {', '.join(PRESETS)}"
            )
    modules = {"attention": attention, "experts": set(), "all": attention | other}[preset]
    config = LoraConfig(
        target_modules=sorted(modules) or None,
        target_parameters=sorted(parameters) if preset != "attention" else None,
        **options,
    )
    if preset != "attention":
        _take_over(config, model)
    return config
