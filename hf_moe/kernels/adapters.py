"""Which computation a layer of frozen experts with adapters gets: the Triton kernels, or torch's grouped products.

Triton is imported at the first call that can use it. Letters as in `lora`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations import moe as hf_moe_integration

from .experts import gating_of, reason_to_fall_back


class Adapter(NamedTuple):
    """One adapter of one projection: W[e] + scaling · b[e] @ a[e], with dropout before a."""

    a_ERI: Tensor
    b_EOR: Tensor
    scaling: float
    dropout: nn.Module

    @property
    def drops(self) -> bool:
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training and self.dropout.p > 0


def base_weight(module: Any, name: str, dtype: torch.dtype) -> Tensor:
    """A frozen projection as (E, O, I). A packed weight has this one place to be unpacked in."""
    weight = getattr(module, name).detach().to(dtype)
    return weight.transpose(1, 2) if module.is_transposed else weight


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def _stacked(adapters: list[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Several adapters are one of their summed rank, filled up to rows of 16 bytes. Scaled before rounding."""
    if not adapters:
        return None
    a_ERI = _joined([adapter.a_ERI.to(dtype) for adapter in adapters], 1)
    # peft keeps b with the experts innermost: the cast turns it too.
    order = torch.contiguous_format
    b_EOR = _joined([(adapter.b_EOR * adapter.scaling).to(dtype, memory_format=order) for adapter in adapters], 2)
    missing = -a_ERI.shape[1] % 8
    if missing:
        a_ERI, b_EOR = nn.functional.pad(a_ERI, (0, 0, 0, missing)), nn.functional.pad(b_EOR, (0, missing))
    return a_ERI, b_EOR


def adapted_experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: dict[str, list[Adapter]],
) -> Tensor:
    """`experts_forward` with adapters: y = W[e] @ x + scaling · b[e] @ (a[e] @ dropout(x)) for either projection.

    Args:
        module: an experts module of Transformers without has_post_expert_norm; its weights and biases are frozen.
        hidden_states, top_k_index, top_k_weights: as for `experts_forward`.
        adapters: those of "gate_up_proj" (or "up_proj") and of "down_proj", by that name.
    Returns:
        (T, D) in hidden_states' dtype. Without a GPU, with dropout, and for gates that the kernels do not know,
        grouped products of torch compute it.
    Gradients: hidden_states, top_k_weights, and a and b of every adapter.
    """
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    kind = hidden_states.device.type
    weight_dtype = module.down_proj.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_dtype
    up, down = (base_weight(module, name, dtype) for name in names)
    biases = [getattr(module, f"{name}_bias").detach().to(dtype) if module.has_bias else None for name in names]
    drops = any(adapter.drops for found in adapters.values() for adapter in found)
    x = hidden_states.to(dtype)
    # The composed path multiplies in dtype already; autocast would only lower a float32 base.
    with torch.autocast(kind, enabled=False):
        if reason_to_fall_back(module, hidden_states) is None and not drops and (gating := gating_of(module)):
            from .lora import experts_lora

            up_lora, down_lora = (_stacked(adapters.get(name, []), dtype) for name in names)
            out = experts_lora(
                x, top_k_index, top_k_weights, up, down, *biases, up_lora=up_lora, down_lora=down_lora, gating=gating
            )
        else:
            pairs = [adapters.get(name, []) for name in names]
            out = _composed(module, x, top_k_index, top_k_weights, (up, down), biases, pairs)
    return out.to(hidden_states.dtype)


def _composed(module, x_TD, index_TK, weight_TK, weights, biases, adapters) -> Tensor:
    """The same from torch's grouped products, which know neither gates nor routes of no expert."""
    (T, K), E = index_TK.shape, weights[0].shape[0]
    expert_N = index_TK.reshape(-1)
    expert_N, row_N = torch.where((expert_N < 0) | (expert_N > E), E, expert_N).sort(stable=True)
    end_E = torch.searchsorted(expert_N, torch.arange(E, device=x_TD.device), right=True).to(torch.int32)
    nobody_N1 = (expert_N == E).unsqueeze(-1)

    def product(x_NI, weight_EOI):
        # Rows of no expert stay unwritten there, in gradients too.
        y_NO = hf_moe_integration._grouped_linear(x_NI.masked_fill(nobody_N1, 0.0), weight_EOI, end_E)
        return y_NO.masked_fill(nobody_N1, 0.0)

    def projection(x_NI, side):
        y_NO = product(x_NI, weights[side])
        if biases[side] is not None:
            y_NO = y_NO + biases[side][expert_N.clamp(max=E - 1)]
        for adapter in adapters[side]:
            # torch's kernels want rows of 16 bytes, next to each other: peft keeps b with the experts innermost.
            missing = -adapter.a_ERI.shape[1] % 8
            a = nn.functional.pad(adapter.a_ERI.to(x_NI.dtype), (0, 0, 0, missing))
            b = nn.functional.pad((adapter.b_EOR * adapter.scaling).to(x_NI.dtype), (0, missing))
            y_NO = y_NO + product(product(adapter.dropout(x_NI), a), b.contiguous())
        return y_NO

    h_NH = projection(x_TD[row_N // K], 0)
    y_ND = projection(module._apply_gate(h_NH) if module.has_gate else module.act_fn(h_NH), 1)
    y_ND = (y_ND * weight_TK.reshape(-1)[row_N].unsqueeze(-1)).masked_fill(nobody_N1, 0.0)
    order_N = torch.empty_like(row_N).scatter_(0, row_N, torch.arange(T * K, device=x_TD.device))
    return y_ND[order_N].view(T, K, -1).sum(1).to(x_TD.dtype)
