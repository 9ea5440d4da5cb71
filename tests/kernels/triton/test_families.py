"""Every kind of experts in Transformers' sources, with our kernels and with its own loop, against float64."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
import transformers
from cases import DEVICE, DTYPES, assert_as_good, normal
from torch import nn
from transformers.activations import ACT2FN

from hf_moe.kernels.experts import NAME, gating_of, reason_to_fall_back

# What runs otherwise than fused, and is right nevertheless.
UNFUSED = {"Inkling2Experts"}
FALLS_BACK = {"MuseSparkExperts"}


def kinds() -> dict[str, str]:
    """Experts classes that differ in more than names: the class, and its module. Most are the same text."""
    found: dict[tuple, tuple[str, str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if "@use_experts_implementation" not in source:
            continue
        for node in ast.parse(source).body:
            decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
            if any(each.startswith("use_experts_implementation") for each in decorators):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                texts = {each.name: ast.unparse(each.body) for each in methods if each.name != "__init__"}
                key = (*decorators, *sorted(texts.items()))
                found.setdefault(key, (node.name, f"transformers.models.{path.parent.name}.{path.stem}"))
    return dict(found.values())


KINDS = kinds()


class Sizes:
    """A configuration that answers every question of an experts class."""

    _experts_implementation = "eager"

    def __init__(self, act: str = "silu"):
        self.act = act

    def __getattr__(self, name: str):
        answers = {
            "act": self.act, "limit": 0.75, "softcap": 0.75, "alpha": 1.702, "eps": 1e-6,
            "hidden_size": 24, "intermediate": 16, "expert": 4, "latent_size": 24,
        }  # fmt: skip
        return next(value for part, value in answers.items() if part in name)


def build(name: str, act: str = "silu") -> nn.Module:
    module = getattr(importlib.import_module(KINDS[name]), name)(Sizes(act)).to(DEVICE)
    for i, parameter in enumerate(module.parameters()):
        parameter.data = exact(*parameter.shape, scale=0.4, seed=i)
    return module


def exact(*size: int, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """Numbers that every dtype holds as they are."""
    return normal(*size, dtype=torch.bfloat16, **options).to(dtype)


def step(module: nn.Module, dtype: torch.dtype, implementation: str) -> dict[str, torch.Tensor]:
    """Output and every gradient."""
    module = module.to(dtype)
    module.config._experts_implementation = implementation
    top = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)).topk(2)
    leaves = {"x": exact(7, 24, dtype=dtype), "weight": top.values.bfloat16().to(DEVICE, dtype)}
    leaves = {key: value.requires_grad_() for key, value in leaves.items()} | dict(module.named_parameters())
    out = module(leaves["x"], top.indices.to(DEVICE), leaves["weight"])
    gradients = torch.autograd.grad(out, list(leaves.values()), exact(*out.shape, dtype=dtype, seed=7))
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


# Their own loop computes in float32, whatever the dtype.
WIDE = {"OpenAIPrivacyFilterExperts"}


@pytest.mark.parametrize("dtype", DTYPES.values() if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_and_gradients(name, dtype):
    truth = step(build(name), torch.float64, "eager")
    plain = step(build(name), dtype, "grouped_mm" if name in WIDE else "eager")
    found = step(build(name), dtype, NAME)
    for key in truth:
        assert_as_good(found[key], plain[key], truth[key], f"{name} {key}")


def test_what_is_fused():
    modules = {name: build(name) for name in KINDS}
    x = torch.zeros(1, 24, device=DEVICE)
    assert {name for name, module in modules.items() if reason_to_fall_back(module, x)} == FALLS_BACK
    assert {name for name, module in modules.items() if gating_of(module) is None} == UNFUSED


# Each activation behind the gate that most have; then gates of their own and no gate, with one that no kernel knows.
COMBINATIONS = [(next(iter(KINDS)), act) for act in ACT2FN]
OTHERS = ("BeamExperts", "DeepseekV4Experts", "NemotronHExperts")
COMBINATIONS += [(name, act) for name in OTHERS for act in ("mish", "gelu")]


@pytest.mark.parametrize(("name", "act"), COMBINATIONS)
def test_every_activation_has_its_own_numbers(name, act):
    truth = step(build(name, act), torch.float64, "eager")
    plain = step(build(name, act), torch.float32, "eager")
    found = step(build(name, act), torch.float32, NAME)
    for key in truth:
        assert_as_good(found[key], plain[key], truth[key], key)
