"""The static cache and the captured step of a model's last `generate`, kept for its next one.

A step depends on addresses, on what its modules are, and on PyTorch's settings: it serves again where all of them are
as they were. Weights may have changed in place.
"""

import weakref
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import OutputRecorder

from .slots_hf_moe import ReplayedCache

# A cache is kept up to this share of the device's memory.
SHARE_OF_MEMORY = 1 / 16
_PLAIN_VALUES = {bool, int, float, str, type(None)}
# One for each model, which lives no longer than it. Outside of the model: a graph can be neither copied nor saved.
_KEPT: weakref.WeakKeyDictionary[nn.Module, ReplayedCache] = weakref.WeakKeyDictionary()


def circumstances(model: Any, batch_size: int) -> tuple | None:
    """All that a step depends on beside the contents of tensors; None where more may be hidden, as in adapters."""
    config, device = model.config, model.device
    # Autocast frees its copies of the weights where it ends, and a graph would go on reading them.
    if torch.is_autocast_enabled(device.type):
        return None
    found: list[Any] = [batch_size, device, config._attn_implementation, config._experts_implementation]
    found += [config.to_json_string(use_diff=False), torch.is_inference_mode_enabled()]
    found += [torch.backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()]
    if device.type == "cuda":
        found.append(torch.cuda.current_stream(device).cuda_stream)
    for module in model.modules():
        if not _is_plain(module):
            return None
        found.append(type(module))
        found += [item for item in module.__dict__.items() if type(item[1]) in _PLAIN_VALUES]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if type(tensor) not in (torch.Tensor, nn.Parameter, type(None)):
                return None
            if tensor is not None:
                found.append((tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()))
    return tuple(found)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is one of ours or of PyTorch, without hooks or another forward."""
    package = type(module).__module__.rpartition(".")[0]
    known = package == __name__.rpartition(".")[0] or package in ("torch.nn.modules", "transformers")
    # Transformers' recorders stay where they once were wanted, and do nothing unless they are wanted again.
    hooks = [hook for hook in module._forward_hooks.values() if hook.__module__ != OutputRecorder.__module__]
    return known and not hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def take(model: nn.Module, made_for: tuple | None, length: int) -> ReplayedCache | None:
    """The model's kept cache, empty, if it was made for the same and has room for so many tokens; kept no longer."""
    cache = _KEPT.pop(model, None)
    if cache is None or made_for is None or cache.made_for != made_for or cache.length < length:
        return None
    cache.reset()
    return cache


def keep(model: Any, cache: ReplayedCache) -> None:
    """Keep a cache and its step, unless it is large or nobody can say what the step depends on."""
    if cache.made_for is None or cache.step is None:
        return
    if cache.nbytes <= SHARE_OF_MEMORY * torch.cuda.mem_get_info(model.device)[1]:
        _KEPT[model] = cache


def forget(model: nn.Module) -> None:
    """Free what is kept for this model."""
    _KEPT.pop(model, None)
