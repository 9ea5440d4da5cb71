"""Sources in 8-bit floats, dequantised one tensor at a time.

    w[i, j] = q[i, j] · s[i ÷ b, j ÷ b']          one scale for the tensor, for each row, or for each block of b × b'

Two spellings are read: `weight_scale_inv` with blocks (DeepSeek-V3's "fp8") and `weight_scale` for a tensor or for rows
(compressed-tensors "float-quantized"). Packed integers (GPTQ, AWQ, compressed-tensors "pack-quantized") are refused.

Source: arXiv:2412.19437 section 3.3 (blocks).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .headers import TensorHeader

if TYPE_CHECKING:
    import torch

_SCALES = ("_scale_inv", "_scale")
# Scales of activations and of the cache; weights do not need them.
_UNUSED = (".input_scale", ".k_scale", ".v_scale", ".output_scale")
_KNOWN = {"fp8": ("",), "compressed-tensors": ("float-quantized", "naive-quantized")}


def scale_names(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Weight → name of its scale, for every 8-bit weight of a source.

    Raises:
        ValueError: a method that is not read, or a weight without its scale.
    """
    quantization = config.get("quantization_config") or {}
    method, style = quantization.get("quant_method"), quantization.get("format", "")
    if not quantization:
        return {}
    if method not in _KNOWN or style not in _KNOWN[method]:
        raise ValueError(
            f"weights quantised by {method} {style}".rstrip()
            + " are not read; known are fp8 in blocks and compressed-tensors float-quantized: "
            "dequantise the model first"
        )
    pairs = {}
    for name, header in headers.items():
        if header.dtype in ("F8_E4M3", "F8_E5M2"):
            found = [name + suffix for suffix in _SCALES if name + suffix in headers]
            if not found:
                raise ValueError(f"{name} is {header.dtype} without a scale: {name}{_SCALES[0]} is missing")
            pairs[name] = found[0]
    return pairs


def presented(headers: Mapping[str, TensorHeader], scales: Mapping[str, str]) -> dict[str, TensorHeader]:
    """Headers as of the dequantised source: float32 weights, no scales."""
    hidden = set(scales.values())
    shown = {}
    for name, header in headers.items():
        if name in hidden or name.endswith(_UNUSED):
            continue
        # Four bytes for each stored one; positions in the file mean nothing for what is computed.
        shown[name] = replace(header, dtype="F32", start=0, stop=4 * header.nbytes) if name in scales else header
    return shown


def dequantise(
    quantised: "torch.Tensor", scale: "torch.Tensor", start: int, rows: int, block: tuple[int, int] | None
) -> "torch.Tensor":
    """Rows from `start` on of a weight of `rows` rows, in float32.

    Args:
        quantised: (stop - start, columns) in 8 bits.
        scale: one number, (rows,) or (rows, 1), or (rows / b, columns / b') rounded up.
        block: (b, b') where the scales are for blocks.
    Raises:
        ValueError: a scale of another shape.
    """
    import torch

    weight, scale = quantised.float(), scale.float()
    index = torch.arange(start, start + weight.shape[0])
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if block is None:
        if scale.numel() != rows:
            raise ValueError(f"a scale of shape {list(scale.shape)} does not fit a weight of {rows} rows")
        return weight * scale.reshape(-1, 1)[index]
    grid = [-(-rows // block[0]), -(-weight.shape[1] // block[1])]
    if list(scale.shape) != grid:
        raise ValueError(f"a scale of shape {list(scale.shape)} does not fit blocks {list(block)}: {grid} is needed")
    return weight * scale[index // block[0]][:, torch.arange(weight.shape[1]) // block[1]]
