"""The slow truth of every op, one expert or one row at a time, in the dtype of its inputs.

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden, F expert width, H = 2F (gated) or F, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .gating import Gating


def route(index_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and offset as in `routing.Routing`, by a stable sort."""
    expert_N = index_TK.reshape(-1).long()
    expert_N = torch.where((expert_N < 0) | (expert_N > n_experts), n_experts, expert_N)
    row_N = expert_N.argsort(stable=True)
    position_N = torch.empty_like(row_N)
    position_N[row_N] = torch.arange(len(row_N), device=row_N.device)
    position_N[expert_N == n_experts] = -1
    offset_E1 = torch.tensor([int((expert_N < e).sum()) for e in range(n_experts + 1)], device=row_N.device)
    return row_N, position_N, offset_E1


def activation(z: Tensor, gating: Gating) -> Tensor:
    if gating.act == "swish":
        return z * torch.sigmoid(gating.alpha * z)
    if gating.act in ("gelu", "gelu_tanh"):
        return functional.gelu(z, approximate="tanh" if gating.act == "gelu_tanh" else "none")
    return functional.relu(z) if gating.act == "relu" else functional.relu(z).square()


def gate(h_NH: Tensor, gating: Gating) -> Tensor:
    """The second projection's input, from the first one's output."""
    if not gating.gated:
        return activation(h_NH, gating)
    gate_NF, up_NF = (h_NH[:, ::2], h_NH[:, 1::2]) if gating.interleaved else h_NH.chunk(2, -1)
    if gating.limit is not None:
        gate_NF, up_NF = gate_NF.clamp(max=gating.limit), up_NF.clamp(-gating.limit, gating.limit)
    return activation(gate_NF, gating) * (up_NF + gating.up_offset)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, offset_E1: Tensor, bias_EO: Tensor | None = None) -> Tensor:
    """y[n] = weight[e] @ x[n] + bias[e]; zero for rows of no expert."""
    y_NO = x_NI.new_zeros((len(x_NI), weight_EOI.shape[1]))
    for e, (first, last) in enumerate(zip(offset_E1[:-1].tolist(), offset_E1[1:].tolist(), strict=True)):
        y_NO[first:last] = x_NI[first:last] @ weight_EOI[e].T
        if bias_EO is not None:
            y_NO[first:last] += bias_EO[e]
    return y_NO


def up_projection(
    x_ND: Tensor, weight_EHD: Tensor, offset_E1: Tensor, gating: Gating, bias_EH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = grouped_linear(x) and a = gate(h)."""
    h_NH = grouped_linear(x_ND, weight_EHD, offset_E1, bias_EH)
    return h_NH, gate(h_NH, gating)


def gating_gradient(
    h_NH: Tensor, da_NF: Tensor, weight_N: Tensor, gating: Gating, y_bias_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, the weighted a, and the gradient of the rows' weights, through autograd. y_bias_N: ⟨dout, bias⟩ a row."""
    h_NH = h_NH.detach().requires_grad_()
    with torch.enable_grad():
        a_NF = gate(h_NH, gating)
        (dh_NH,) = torch.autograd.grad(a_NF, h_NH, da_NF * weight_N[:, None])
    a_NF = a_NF.detach()
    dweight_N = (da_NF * a_NF).sum(-1)
    return dh_NH, a_NF * weight_N[:, None], dweight_N if y_bias_N is None else dweight_N + y_bias_N


def combine(y_ND: Tensor, weight_TK: Tensor | None, position_N: Tensor, K: int) -> Tensor:
    """out[t] = Σ_k weight[t, k] · y[position[t, k]] over routes that have an expert."""
    out_TD = y_ND.new_zeros((len(position_N) // K, y_ND.shape[1]))
    for n, position in enumerate(position_N.tolist()):
        if position >= 0:
            out_TD[n // K] += y_ND[position] * (1 if weight_TK is None else weight_TK[n // K, n % K])
    return out_TD


def spread(x_TD: Tensor, row_N: Tensor, K: int) -> Tensor:
    """y[n] = x[row[n] // K]."""
    return x_TD[row_N // K]


def spread_low_rank(x_TD: Tensor, a_ERD: Tensor, row_N: Tensor, offset_E1: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The rows, and z[n] = a[e] @ y[n]."""
    y_ND = spread(x_TD, row_N, K)
    return y_ND, grouped_linear(y_ND, a_ERD, offset_E1)


def weight_gradient(left_NO: Tensor, right_NI: Tensor, offset_E1: Tensor) -> Tensor:
    """dw[e] = Σ left[n] ⊗ right[n] over the expert's rows."""
    pairs = zip(offset_E1[:-1].tolist(), offset_E1[1:].tolist(), strict=True)
    return torch.stack([left_NO[first:last].T @ right_NI[first:last] for first, last in pairs])


def adapted_gating_gradient(
    h_NH: Tensor, da_NF: Tensor, weight_N: Tensor, offset_E1: Tensor, gating: Gating, up, down, y_bias_N=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh, the gradient of the rows' weights, and the narrow products with up = (z, up_b) and down = (dz, down_a)."""
    (z_NR, up_b_EHR), (dz_NS, down_a_ESF) = up, down
    dh_NH, wa_NF, dweight_N = gating_gradient(h_NH, da_NF, weight_N, gating, y_bias_N)
    up_dz_NR, aa_NS = (
        grouped_linear(dh_NH, up_b_EHR.transpose(1, 2), offset_E1),
        grouped_linear(wa_NF, down_a_ESF, offset_E1),
    )
    dup_b_EHR, ddown_a_ESF = weight_gradient(dh_NH, z_NR, offset_E1), weight_gradient(dz_NS, wa_NF, offset_E1)
    return dh_NH, dweight_N, up_dz_NR, dup_b_EHR, aa_NS, ddown_a_ESF


def bias_gradient(y_NC: Tensor, offset_E1: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """db[e] = Σ weight[n] · y[n] over the expert's rows."""
    if weight_N is not None:
        y_NC = y_NC * weight_N[:, None]
    pairs = zip(offset_E1[:-1].tolist(), offset_E1[1:].tolist(), strict=True)
    return torch.stack([y_NC[first:last].sum(0) for first, last in pairs])


def experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    *,
    gating: Gating,
) -> Tensor:
    """The layer, one expert at a time; autograd gives its gradients."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(up_EHD.shape[0]):
        token, choice = (index_TK == e).nonzero(as_tuple=True)
        h = x_TD[token] @ up_EHD[e].T
        if up_bias_EH is not None:
            h = h + up_bias_EH[e]
        y = gate(h, gating) @ down_EDF[e].T
        if down_bias_ED is not None:
            y = y + down_bias_ED[e]
        out_TD = out_TD.index_add(0, token, (y * weight_TK[token, choice, None]).to(x_TD.dtype))
    return out_TD


def experts_lora(
    x_TD, index_TK, weight_TK, up_EHD, down_EDF, up_bias_EH=None, down_bias_ED=None, *, up_lora=None, down_lora=None,
    gating: Gating,
) -> Tensor:  # fmt: skip
    """The layer of the summed weights, W + b @ a."""
    up_EHD = up_EHD if up_lora is None else up_EHD + up_lora[1] @ up_lora[0]
    down_EDF = down_EDF if down_lora is None else down_EDF + down_lora[1] @ down_lora[0]
    return experts(x_TD, index_TK, weight_TK, up_EHD, down_EDF, up_bias_EH, down_bias_ED, gating=gating)


def latent_decode(
    q_latent, q_rot, latent, k_rot, *, scaling, attention_mask=None, is_causal=None, start_B=None, end_B=None,
    window=None, softcap=None, sinks_H=None, value_HVC=None,
) -> Tensor:  # fmt: skip
    """Keys and values are the cache itself; each group of heads has its own rotary key."""
    (B, H, S, P), L = q_rot.shape, latent.shape[2]
    groups = k_rot.squeeze(1).unflatten(-1, (-1, P)).transpose(1, 2)
    score = q_rot @ groups.repeat_interleave(H // groups.shape[1], dim=1).mT
    if q_latent is not None:
        score = score + q_latent @ latent.mT
    score = score * scaling
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    seen = torch.ones(B, 1, S, L, dtype=torch.bool, device=score.device)
    at = torch.arange(L, device=score.device)
    end = torch.tensor([L], device=score.device) if end_B is None else end_B
    until = end.view(-1, 1, 1, 1)
    if is_causal or (is_causal is None and (attention_mask is None or end_B is not None)):
        until = until - S + 1 + torch.arange(S, device=score.device)[:, None]
    seen &= at < until
    if start_B is not None:
        seen &= at >= start_B.view(-1, 1, 1, 1)
    if window is not None:
        seen &= at >= until - window
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        seen = seen & attention_mask
    elif attention_mask is not None:
        score = score + attention_mask
    score = score.masked_fill(~seen, -torch.inf)
    if sinks_H is not None:
        score = torch.cat((score, sinks_H.to(score.dtype).view(1, H, 1, 1).expand(*score.shape[:3], 1)), dim=-1)
    out = score.softmax(-1).nan_to_num()[..., :L] @ latent
    out = out.masked_fill((end > L).view(-1, 1, 1, 1), torch.nan)
    return out if value_HVC is None else torch.einsum("bhsc,hvc->bshv", out, value_HVC)


def latent_decode_packed(
    q_latent,
    q_rot,
    latent,
    k_rot,
    *,
    query_start,
    key_start,
    slot_L=None,
    latent_width=None,
    rotary_width=None,
    **options,
) -> Tensor:
    """One sequence at a time; pages are gathered first."""
    if slot_L is not None:
        tokens = torch.cat((latent[slot_L], k_rot[slot_L]), -1)[None, None, :, : latent_width + rotary_width]
        latent, k_rot = tokens.split([latent_width, rotary_width], -1)
    bounds = [t.tolist() for t in (query_start, key_start)]
    outs = []
    for q0, q1, k0, k1 in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        query = None if q_latent is None else q_latent[:, :, q0:q1]
        keys = latent[:, :, k0:k1], k_rot[:, :, k0:k1]
        outs.append(latent_decode(query, q_rot[:, :, q0:q1], *keys, **options))
    return torch.cat(outs, dim=2 if options.get("value_HVC") is None else 1)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, rounds: bool = True) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * unit.to(x.dtype) if rounds else (weight_D * unit).to(x.dtype)


def cross_entropy(logits_TV: Tensor, target_T: Tensor, ignore_index: int = -100) -> Tensor:
    """-log softmax(logits)[target]; 0 where the target is ignore_index."""
    ignored = target_T == ignore_index
    log_TV = logits_TV.log_softmax(-1)
    return -log_TV.gather(1, target_T.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """x (B, heads, S, P) by angles whose cos and sin are (B or 1, S, P)."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    a, b = (x[..., ::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def latent_entry(query_BSX, latent_key_BSY, cos, sin, *, heads, nope, latent_width, norm_C, eps, interleave):
    """Without a cache."""
    query = query_BSX.unflatten(-1, (heads, -1)).transpose(1, 2)
    query = torch.cat((query[..., :nope], rotate(query[..., nope:], cos, sin, interleave)), dim=-1)
    latent, key = latent_key_BSY.tensor_split([latent_width], dim=-1)
    if norm_C is not None:
        latent = rms_norm(latent, norm_C, eps)
    key = rotate(key.unflatten(-1, (-1, query.shape[-1] - nope)).transpose(1, 2), cos, sin, interleave)
    return query, latent[:, None], key.transpose(1, 2).flatten(2)[:, None]


def expert_choice(x_TD, weight_ED, bias_E, *, top_k, sigmoid, groups=1, top_groups=1, normalise, factor):
    logits_TE = x_TD @ weight_ED.T
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
    choice_TGX = (scores_TE if bias_E is None else scores_TE + bias_E).unflatten(-1, (groups, -1))
    best = choice_TGX.topk(1 if bias_E is None or groups == 1 else 2, -1).values.sum(-1).topk(top_groups, -1).indices
    allowed_TG = torch.zeros_like(choice_TGX[..., 0], dtype=torch.bool).scatter(1, best, True)
    choice_TE = choice_TGX.masked_fill(~allowed_TG[..., None], -torch.inf).flatten(1)
    index_TK = choice_TE.topk(top_k, -1).indices
    weight_TK = scores_TE.gather(1, index_TK)
    if normalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return logits_TE, weight_TK * factor, index_TK


def routed_rows(
    x_NI: Tensor, weight_EHI: Tensor, expert_N: Tensor, gating: Gating | None = None, bias_EH: Tensor | None = None
) -> Tensor:
    """y[n] = gate(weight[e] @ x[n] + bias[e]) with e = expert[n]; zero where there is no such expert."""
    rows = []
    for x_I, e in zip(x_NI, expert_N.tolist(), strict=True):
        h_H = weight_EHI[max(e, 0) % len(weight_EHI)] @ x_I
        if bias_EH is not None:
            h_H = h_H + bias_EH[max(e, 0) % len(weight_EHI)]
        y = h_H if gating is None else gate(h_H[None], gating)[0]
        rows.append(y if 0 <= e < len(weight_EHI) else torch.zeros_like(y))
    return torch.stack(rows)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_TI @ weight_OI.T


def gated_mlp(
    x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, act: str = "swish", added_TD: Tensor | None = None
) -> Tensor:
    y_TD = (activation(x_TD @ gate_FD.T, Gating(act)) * (x_TD @ up_FD.T)) @ down_DF.T
    return y_TD if added_TD is None else y_TD + added_TD
