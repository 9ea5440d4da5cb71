"""FP8 checkpoints in DeepSeek-V3's blocks, loaded as the numbers they stand for.

Transformers' own conversion needs weights that blocks divide; the latent projection's 576 rows are 4.5 blocks of 128.
"""

from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

METHOD = "hf_moe_fp8"
# A method that was renamed would never be called, and the weights would be wrong without a word.
for _parent, _method in (
    (Fp8Dequantize, "_dequantize_one"),
    (FineGrainedFP8HfQuantizer, "get_load_operations"),
    (FineGrainedFP8HfQuantizer, "_process_model_after_weight_loading"),
):
    if not hasattr(_parent, _method):
        raise ImportError(f"{_parent.__name__} has no {_method}")


class BlockDequantize(Fp8Dequantize):
    """weight[i, j] · scale[i // b, j // b'], whose last blocks may be cut off. Source: arXiv:2412.19437 section 3.3."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        rows, columns = self.hf_quantizer.quantization_config.weight_block_size
        whole = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        shape = quantized.shape
        if whole.shape[0] - shape[0] not in range(rows) or whole.shape[1] - shape[1] not in range(columns):
            raise ValueError(
                f"scales of shape {tuple(scales.shape)} are not those of a weight of shape {tuple(shape)} "
                f"in blocks of {rows} × {columns}"
            )
        return (quantized.float() * whole[: shape[0], : shape[1]]).to(output_dtype or torch.bfloat16)


class BlockFP8Quantizer(FineGrainedFP8HfQuantizer):
    """Loads only, and always dequantises; needs no GPU."""

    def get_load_operations(self) -> dict[str, type]:
        return {"dequantize": BlockDequantize}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Saving would otherwise run the conversions backwards, into FP8.
        model._weight_conversions = None
        return model


def dequantising(quantization: dict[str, Any]) -> dict[str, Any]:
    """The quantization part of an FP8 checkpoint's configuration, made to load through the classes above."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FineGrainedFP8Config)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, BlockFP8Quantizer)
    return quantization | {"quant_method": METHOD, "dequantize": True}
