"""Quantised sources, dequantised one tensor at a time: which stored tensors make a weight, and how.

    w[i, j] = (q[i, j] - z) · s       one scale for the tensor, for each row, each group of columns, or block of b × b'

8-bit numbers are read here: `weight_scale_inv` with blocks (DeepSeek-V3's "fp8"), and `weight_scale` of
compressed-tensors ("float-quantized", "int-quantized"). Packed integers (GPTQ, AWQ, "pack-quantized") are unpacked in
`packed`. A product of a 16-bit scale and a whole number of up to 8 bits is exact in float32: nothing is rounded.

Source: arXiv:2412.19437 section 3.3 (blocks).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .headers import TensorHeader

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
Headers = Mapping[str, TensorHeader]
# Scales of activations and of the cache; weights do not need them.
_UNUSED = (".input_scale", ".input_zero_point", ".k_scale", ".v_scale", ".output_scale")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True)
class Encoding:
    """How one weight is stored.

    Attributes:
        shape: of the weight.
        parts: role → name of a stored tensor; the first one holds the numbers.
        rows: roles that are read by the weight's rows. The others are read whole.
        decode: (role → tensor, start, stop) → rows `start` to `stop` of the weight in float32.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    rows: tuple[str, ...]
    decode: Callable[..., "torch.Tensor"]


def encodings(config: Config, headers: Headers) -> dict[str, Encoding]:
    """Weight → how it is stored, for every quantised weight of a source; nothing of a plain one.

    Raises:
        ValueError: a method that is not read, or a weight without its scale.
    """
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    if not quantization:
        return {}
    method = quantization.get("quant_method") or "compressed-tensors"
    style = {"gptq": "checkpoint_format", "awq": "version"}.get(method, "format")
    style = str(quantization.get(style) or {"gptq": "gptq", "awq": "gemm"}.get(method, "")).lower()
    reader = _READERS.get((method, style))
    if reader is None:
        known = ", ".join(" ".join(each).strip() for each in _READERS)
        raise ValueError(
            f"weights quantised by {method} {style}".rstrip() + f" are not read; known are {known}: dequantise the "
            "model first"
        )
    return reader(quantization, headers)


def presented(headers: Headers, encoded: Mapping[str, Encoding]) -> dict[str, TensorHeader]:
    """Headers as of the dequantised source: float32 weights, no scales."""
    hidden = {name for encoding in encoded.values() for name in encoding.parts.values()}
    # Four bytes for each number; positions in the file mean nothing for what is computed.
    shown = {
        name: header
        for name, header in headers.items()
        if name not in hidden and not (encoded and name.endswith(_UNUSED))
    }
    for name, encoding in encoded.items():
        numbers = headers[next(iter(encoding.parts.values()))]
        size = 4 * encoding.shape[0] * encoding.shape[1]
        shown[name] = replace(numbers, dtype="F32", shape=encoding.shape, start=0, stop=size)
    return shown


def added_biases(headers: Headers, encoded: Mapping[str, Encoding]) -> list[list[str]]:
    """Biases of quantised modules, those of one module in all layers together: packers give zeros to who has none."""
    alike: dict[str, list[str]] = {}
    for weight in encoded:
        bias = f"{weight.removesuffix('weight')}bias"
        if bias in headers:
            alike.setdefault(re.sub(r"\d+", "*", bias), []).append(bias)
    return list(alike.values())


def _eight_bits(quantization: Config, headers: Headers) -> dict[str, Encoding]:
    block = quantization.get("weight_block_size")
    for group in (quantization.get("config_groups") or {}).values():
        block = block or (group.get("weights") or {}).get("block_structure")
    found = {}
    for name, header in headers.items():
        if header.dtype not in _EIGHT_BITS or len(header.shape) != 2 or name.endswith("_zero_point"):
            continue
        parts = {"weight": name}
        for role in ("scale_inv", "scale", "zero_point"):
            if f"{name}_{role}" in headers:
                parts.setdefault("scale" if role == "scale_inv" else role, f"{name}_{role}")
        if "scale" not in parts:
            raise ValueError(f"{name} is {header.dtype} without a scale: {name}_scale_inv is missing")
        decode = partial(dequantise, rows=header.shape[0], block=tuple(block) if block else None)
        found[name] = Encoding(header.shape, parts, ("weight",), decode)
    return found


def dequantise(
    stored: Mapping[str, "torch.Tensor"], start: int, stop: int, *, rows: int, block: tuple[int, int] | None
) -> "torch.Tensor":
    """Rows from `start` on of a weight of `rows` rows, in float32.

    Args:
        stored: weight, (stop - start, columns) in 8 bits; scale, and a zero point of its shape or none: one number,
            (rows,), (rows, groups of columns), or (rows / b, columns / b') rounded up.
        block: (b, b') where the scales are for blocks.
    Raises:
        ValueError: a scale of another shape.
    """
    import torch

    weight, scale = stored["weight"].float(), stored["scale"].float()
    columns, index = weight.shape[1], torch.arange(start, stop)

    def spread(numbers: torch.Tensor) -> torch.Tensor:
        if numbers.numel() == 1:
            return numbers.reshape(1, 1)
        grid = numbers.reshape(numbers.shape[0], -1)
        if block is not None:
            needed = [-(-rows // block[0]), -(-columns // block[1])]
            if list(numbers.shape) != needed:
                raise ValueError(
                    f"a scale of shape {list(numbers.shape)} does not fit blocks {list(block)}: {needed} is needed"
                )
            return grid[index // block[0]][:, torch.arange(columns) // block[1]]
        if grid.shape[0] != rows or columns % grid.shape[1]:
            raise ValueError(
                f"a scale of shape {list(numbers.shape)} does not fit a weight of {rows} rows and {columns} columns"
            )
        return grid[index].repeat_interleave(columns // grid.shape[1], dim=1)

    if "zero_point" in stored:
        weight -= spread(stored["zero_point"].float())
    return weight * spread(scale)


def _packed(
    headers: Headers, numbers: str, needed: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """Module → role → stored tensor, for every module with `numbers`."""
    found = {}
    for name in headers:
        module, _, role = name.rpartition(".")
        if role == numbers:
            parts = {each: f"{module}.{each}" for each in (numbers, *needed)}
            if missing := [each for each in parts.values() if each not in headers]:
                raise ValueError(f"{name} is packed without {missing[0]}")
            found[module] = parts | {each: f"{module}.{each}" for each in optional if f"{module}.{each}" in headers}
    return found


def _gptq(quantization: Config, headers: Headers) -> dict[str, Encoding]:
    from .packed import dequantise_gptq

    first_version = quantization.get("checkpoint_format") != "gptq_v2"
    found = {}
    for module, parts in _packed(headers, "qweight", ("qzeros", "scales"), ("g_idx",)).items():
        outputs = headers[parts["scales"]].shape[1]
        # From the shapes, since single modules may have bits of their own.
        bits = 32 * headers[parts["qzeros"]].shape[1] // outputs
        if bits not in (2, 4, 8):
            raise ValueError(f"{module} is packed in {bits} bits; known are 2, 4 and 8")
        shape = (outputs, headers[parts["qweight"]].shape[0] * 32 // bits)
        decode = partial(dequantise_gptq, bits=bits, first_version=first_version)
        found[f"{module}.weight"] = Encoding(shape, parts, (), decode)
    return found


def _awq(quantization: Config, headers: Headers) -> dict[str, Encoding]:
    from .packed import dequantise_awq

    if (bits := quantization.get("bits", quantization.get("w_bit", 4))) != 4:
        raise ValueError(f"AWQ weights of {bits} bits are not read; known are 4")
    found = {}
    for module, parts in _packed(headers, "qweight", ("qzeros", "scales"), ()).items():
        shape = (headers[parts["scales"]].shape[1], headers[parts["qweight"]].shape[0])
        found[f"{module}.weight"] = Encoding(shape, parts, (), dequantise_awq)
    return found


def _pack_quantized(quantization: Config, headers: Headers) -> dict[str, Encoding]:
    from .packed import dequantise_compressed

    groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    bits = {group.get("num_bits") for group in groups}
    if len(bits) != 1 or not isinstance(width := bits.pop(), int) or not 1 <= width <= 8:
        raise ValueError("config_groups must name one number of bits, from 1 to 8, for all pack-quantized weights")
    found = {}
    needed, optional = ("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
    for module, parts in _packed(headers, "weight_packed", needed, optional).items():
        rows, integers = headers[parts["weight_packed"]].shape
        decode = partial(dequantise_compressed, bits=width)
        found[f"{module}.weight"] = Encoding((rows, integers * (32 // width)), parts, ("weight_packed",), decode)
    return found


_READERS: dict[tuple[str, str], Callable[[Config, Headers], dict[str, Encoding]]] = {
    ("fp8", ""): _eight_bits,
    ("compressed-tensors", "float-quantized"): _eight_bits,
    ("compressed-tensors", "int-quantized"): _eight_bits,
    ("compressed-tensors", "naive-quantized"): _eight_bits,
    ("compressed-tensors", "pack-quantized"): _pack_quantized,
    ("gptq", "gptq"): _gptq,
    ("gptq", "gptq_v2"): _gptq,
    ("awq", "gemm"): _awq,
}
