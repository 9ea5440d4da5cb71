"""From hidden states to expert weights: scores, groups, top-k; and the losses that keep experts busy.

Letters: T tokens, D hidden, E experts, K experts a token, B batch, S query length.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_hf_moe import HfMoeConfig
from .fused_hf_moe import fused


class HfMoeTopkRouter(nn.Module):
    """Score every expert for every token and keep the best K.

        logits  = x · Wᵀ                              fp32
        scores  = softmax(logits) or sigmoid(logits)
        chosen  = top-K of (scores + bias) inside the best `topk_group` groups
        weights = scores[chosen] / Σ scores[chosen] · routed_scaling_factor

    A group is ranked by its best expert ("group_limited_greedy") or by its best two ("noaux_tc"). The bias
    `e_score_correction_bias` steers the choice only: no gradient, no part in the weights.

    With `topk_each_group` every group gives its best K / n_group experts, and weights are normalised inside of each:
    where a group holds the copies of one piece of an MLP, the pieces add up to the MLP whatever the router says.

    A weight that is normalised alone (K = 1, or one expert of a group) is 1, with the gradient of its score over a
    constant: that of the quotient is zero, and no router learns from it.

    Weights are fp32, or fp64 where experts compute in fp32 on a CPU.

    `batch_share`, where training sets it, is the experts' share (E,) of a whole batch's choices: the load-balancing
    loss then takes it for f, and not that of the micro-batch.

    Gradients: through `weights` to x and W; the choice itself has none.
    Cost: 2·T·D·E FLOPs.
    Source: arXiv:2405.04434 section 2.1.2; arXiv:2412.19437 section 2.1.2; arXiv:2408.15664 (the bias);
        arXiv:2505.21411 (the same number from each group).
    """

    batch_share: torch.Tensor | None = None

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.hidden_dim = config.hidden_size
        self.scoring_func = config.scoring_func
        self.topk_method = config.topk_method
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.topk_each_group = config.topk_each_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))
        self.e_score_correction_bias: torch.Tensor
        if self.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (T, E), weights (T, K) and indices (T, K) for hidden states (..., D)."""
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        kernel = None if self.topk_each_group else fused("expert_choice", x_TD, self.weight)
        if kernel is not None:
            has_bias = self.topk_method == "noaux_tc"
            chosen = kernel(
                x_TD,
                self.weight,
                self.e_score_correction_bias if has_bias else None,
                top_k=self.top_k,
                sigmoid=self.scoring_func == "sigmoid",
                groups=1 if self.topk_method == "greedy" else self.n_group,
                top_groups=self.topk_group,
                normalise=self.norm_topk_prob,
                factor=self.routed_scaling_factor,
            )
            if chosen is not None:
                return chosen
        # Autocast would take the product down to half precision again.
        with maybe_autocast(x_TD.device.type, enabled=False):
            router_logits = F.linear(x_TD.float(), self.weight.float())
        scores = self.scores(router_logits)
        if x_TD.device.type == "cpu" and x_TD.dtype in (torch.float32, torch.float64):
            # One precision above the experts' outputs: a mixture of equal experts is then their one MLP to the bit,
            # where fp32 products would round twice and move a deep model's logits by 1e-4.
            scores = scores.double()
        top_k_weights, top_k_index = self.select(scores)
        return router_logits, top_k_weights, top_k_index

    def scores(self, router_logits: torch.Tensor) -> torch.Tensor:
        """Scores (T, E) in fp32 of logits (T, E)."""
        if self.scoring_func == "sigmoid":
            return router_logits.float().sigmoid()
        return router_logits.float().softmax(dim=-1)

    def select(self, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (T, K) and indices (T, K) of the chosen experts."""
        choice_TE = scores_TE
        if self.topk_method == "noaux_tc":
            choice_TE = scores_TE + self.e_score_correction_bias
        if self.topk_each_group:
            return self._select_of_each_group(scores_TE, choice_TE)
        if self.topk_method != "greedy" and self.n_group > 1:
            choice_TE = choice_TE.masked_fill(~self._allowed_experts(choice_TE), float("-inf"))
        index_TK = torch.topk(choice_TE, self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, index_TK)
        if self.norm_topk_prob:
            weights_TK = _normalised(weights_TK)
        return weights_TK * self.routed_scaling_factor, index_TK

    def _select_of_each_group(
        self, scores_TE: torch.Tensor, choice_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # G groups, each of E / G experts, of which J = K / G are chosen.
        scores_TGE, choice_TGE = (each.unflatten(-1, (self.n_group, -1)) for each in (scores_TE, choice_TE))
        index_TGJ = torch.topk(choice_TGE, self.top_k // self.n_group, dim=-1, sorted=False).indices
        weights_TGJ = scores_TGE.gather(-1, index_TGJ)
        if self.norm_topk_prob:
            weights_TGJ = _normalised(weights_TGJ)
        first_G1 = torch.arange(0, self.num_experts, scores_TGE.shape[-1], device=index_TGJ.device).unsqueeze(-1)
        return weights_TGJ.flatten(1) * self.routed_scaling_factor, (index_TGJ + first_G1).flatten(1)

    def _allowed_experts(self, choice_TE: torch.Tensor) -> torch.Tensor:
        grouped = choice_TE.unflatten(-1, (self.n_group, -1))
        best = 2 if self.topk_method == "noaux_tc" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        group_index = group_scores.topk(self.topk_group, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, group_index, True)
        return allowed.unsqueeze(-1).expand_as(grouped).reshape_as(choice_TE)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, {self.scoring_func}, {self.topk_method}"


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    """Weights over their sum in the last dimension; see `HfMoeTopkRouter` on one that is alone there."""
    total = weights.sum(dim=-1, keepdim=True)
    return weights / ((total.detach() if weights.shape[-1] == 1 else total) + 1e-20)


def load_balancing_loss(
    scores_TE: torch.Tensor,
    index_TK: torch.Tensor,
    mask_T: torch.Tensor | None,
    share_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Penalty for experts that are both often chosen and highly scored.

        loss = E · Σ_e f_e · p_e      f_e = share of the choices that fell on e,  p_e = mean normalised score of e

    1 when the load is even, E/K at worst.

    Args:
        scores_TE: router scores, fp32; sigmoid scores are divided by their sum over the experts here. With dimensions
            before T, here and in the other arguments, there is a loss for each of them.
        index_TK: chosen experts.
        mask_T: 1 for tokens that count, 0 for padding; None for all.
        share_E: f of a larger batch, in the place of this one's. The loss is then a mean over tokens.
    Returns:
        Scalar, fp32. 0 when no token counts.
    Gradients: to the scores through p; f has none.
    Source: arXiv:2101.03961 equations 4-6; normalised scores as in arXiv:2412.19437 equation 18; f of a larger batch,
        arXiv:2501.11873.
    """
    p_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    mask_T1 = (torch.ones_like(p_TE[..., 0]) if mask_T is None else mask_T.to(p_TE.dtype)).unsqueeze(-1)
    count = mask_T1.sum(dim=-2).clamp(min=1)
    p_E = (p_TE * mask_T1).sum(dim=-2) / count
    if share_E is None:
        chosen_TE = torch.zeros_like(p_TE).scatter_(-1, index_TK, 1.0 / index_TK.shape[-1])
        share_E = (chosen_TE * mask_T1).sum(dim=-2) / count
    return p_TE.shape[-1] * (share_E.to(p_E) * p_E).sum(dim=-1)


def sequence_balancing_loss(
    scores_TE: torch.Tensor, index_TK: torch.Tensor, batch_size: int, mask_T: torch.Tensor | None
) -> torch.Tensor:
    """Mean over the sequences of `load_balancing_loss` inside each one.

    Args as there; rows of one sequence are adjacent and all sequences are T / batch_size long.
    Source: arXiv:2412.19437 equations 17-20.
    """
    scores_BSE, index_BSK = (each.unflatten(0, (batch_size, -1)) for each in (scores_TE, index_TK))
    mask_BS = None if mask_T is None else mask_T.view(batch_size, -1)
    return load_balancing_loss(scores_BSE, index_BSK, mask_BS).mean()


def router_z_loss(router_logits: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Mean of (logsumexp of the router's logits)², which keeps them small.

    Args:
        router_logits: (T, E). mask_T: 1 for tokens that count; None for all.
    Source: arXiv:2202.08906 equation 5.
    """
    z_T = router_logits.float().logsumexp(dim=-1).square()
    if mask_T is None:
        return z_T.mean()
    return (z_T * mask_T).sum() / mask_T.sum().clamp(min=1)


def auxiliary_loss(
    config: HfMoeConfig,
    routers: list[HfMoeTopkRouter],
    router_logits: tuple[torch.Tensor, ...],
    batch_size: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the three losses above, each a mean over the sparse layers and times its coefficient.

    Args:
        routers, router_logits: one a sparse layer, in order; logits (T, E) with T = batch_size · S.
        attention_mask: (B, S), 0 for padding and anything else for a token; a mask of another shape says nothing of
            padding, and every token counts.
    Returns:
        Scalar, fp32.
    """
    mask_T = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        # What is cached, and prompts that peft puts in front, come first and have no logits here.
        length = router_logits[0].shape[0] // batch_size
        mask_T = (attention_mask[:, -length:] != 0).reshape(-1).float()
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for router, logits in zip(routers, router_logits, strict=True):
        logits = logits.to(total.device)
        mask = None if mask_T is None else mask_T.to(total.device)
        scores = router.scores(logits)
        index = router.select(scores.detach())[1]
        if config.router_aux_loss_coef:
            total = total + config.router_aux_loss_coef * load_balancing_loss(scores, index, mask, router.batch_share)
        if config.router_seq_aux_loss_coef:
            loss = sequence_balancing_loss(scores, index, batch_size, mask)
            total = total + config.router_seq_aux_loss_coef * loss
        if config.router_z_loss_coef:
            total = total + config.router_z_loss_coef * router_z_loss(logits, mask)
    return total / len(router_logits)


def target_share(
    labels: torch.Tensor, shift_labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor | float:
    """This micro-batch's part of all target tokens of an optimizer step; 1 when their number is not given."""
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != -100).sum() / num_items_in_batch
