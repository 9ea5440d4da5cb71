"""Groups from activations: neurons that work together as experts, tokens that look alike as rows of a router.

    contribution of neuron n to token t    a[t, n] = |h[t, n]| · ‖W_down[:, n]‖        h = act(W_gate x) · W_up x
    n is active for t                      a[t, n] is among the largest tenth of t
    experts                                balanced k-means over the neurons' vectors of active tokens
    router                                 least squares from x to each expert's summed contribution

Letters: T tokens, D hidden, F neurons, E experts.
Source: arXiv:2502.04416 (active neurons, shared first, balanced clusters); arXiv:2110.01786 (experts by co-activation).
The linear router, which serves a softmax gate, is this project's.
"""

import torch

from .random import generator

_ACTIVE, _ROUNDS = 0.1, 12
# Deviation of a calibrated router's logits: small, so that normalised weights of the chosen experts are about equal.
_LOGIT_STD = 0.02


def active(contribution_TF: torch.Tensor) -> torch.Tensor:
    """1 where a neuron is among its token's largest tenth, else 0; (T, F) in float32."""
    count = max(1, round(_ACTIVE * contribution_TF.shape[1]))
    index = contribution_TF.topk(count, dim=1).indices
    return torch.zeros_like(contribution_TF, dtype=torch.float32).scatter_(1, index, 1.0)


def group_neurons(contribution_TF: torch.Tensor, experts: int, shared: int, seed: str) -> torch.Tensor:
    """Order of the neurons (F,): `shared` parts that are active most often, then `experts` groups, all of one size.

    Args:
        contribution_TF: F is divisible by experts + shared.
    """
    vectors_FT = active(contribution_TF).T
    width = len(vectors_FT) // (experts + shared)
    by_rate = vectors_FT.sum(1).argsort(descending=True, stable=True)
    always, rest = by_rate[: shared * width].sort().values, by_rate[shared * width :].sort().values
    group = balanced_kmeans(vectors_FT[rest], experts, seed)
    return torch.cat([always, *(rest[group == e] for e in range(experts))])


def balanced_kmeans(vectors_NT: torch.Tensor, groups: int, seed: str) -> torch.Tensor:
    """Group of each vector (N,), exactly N / groups in each: k-means whose assignment fills places.

    Cost: 2·N·T·groups FLOPs a round, twelve rounds at most.
    """
    centre = kmeans_start(vectors_NT, groups, seed)
    group = torch.full((len(vectors_NT),), -1)
    for _ in range(_ROUNDS):
        # Squared distance up to each vector's own norm.
        distance = centre.square().sum(1) - 2 * vectors_NT @ centre.T
        new = fill_places(-distance)
        if torch.equal(new, group):
            break
        group = new
        centre = torch.stack([vectors_NT[group == g].mean(0) for g in range(groups)])
    return group


def fill_places(score_NG: torch.Tensor) -> torch.Tensor:
    """The best group of each row (N,) with exactly N / G rows in each group.

    In turns, each row without a place asks for the best group that has one; a full group keeps those that gain most
    over their next choice.
    """
    rows, groups = score_NG.shape
    score, group = score_NG.clone(), torch.full((rows,), -1)
    places = torch.full((groups,), rows // groups)
    while (group < 0).any():
        waiting = (group < 0).nonzero()[:, 0]
        best = score[waiting].topk(min(2, groups), dim=1)
        gain = best.values[:, 0] - best.values[:, -1].nan_to_num(neginf=-1e30)
        for g in range(groups):
            asking = (best.indices[:, 0] == g).nonzero()[:, 0]
            taken = asking[gain[asking].argsort(descending=True, stable=True)[: places[g]]]
            group[waiting[taken]] = g
            places[g] -= len(taken)
        score[:, places == 0] = -torch.inf
    return group


def kmeans_start(vectors_NT: torch.Tensor, groups: int, seed: str) -> torch.Tensor:
    """First centres: vectors drawn with a probability in proportion to their squared distance (k-means++)."""
    random = generator(seed)
    chosen = [int(torch.randint(len(vectors_NT), (), generator=random))]
    distance = (vectors_NT - vectors_NT[chosen[0]]).square().sum(1)
    while len(chosen) < groups:
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(weights, 1, generator=random)))
        distance = torch.minimum(distance, (vectors_NT - vectors_NT[chosen[-1]]).square().sum(1))
    return vectors_NT[chosen]


def activity_router(
    x_TD: torch.Tensor, contribution_TF: torch.Tensor, order_F: torch.Tensor, experts: int
) -> torch.Tensor:
    """Router (E, D) whose logits follow the experts' contributions: ridge regression, tokens' means taken off.

    Args:
        order_F: the experts' neurons, expert by expert.
    """
    share_TE = contribution_TF[:, order_F].unflatten(1, (experts, -1)).sum(2).double()
    share_TE = share_TE - share_TE.mean(1, keepdim=True)
    x = x_TD.double()
    gram = x.T @ x
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return _scaled(torch.linalg.solve(gram, x.T @ share_TE).T, x)


def centroid_router(x_TD: torch.Tensor, groups: int, seed: str) -> torch.Tensor:
    """Router (groups, D) whose rows are the centres of the tokens' clusters, their mean taken off (k-means)."""
    x = x_TD.float()
    centre = kmeans_start(x, groups, seed)
    for _ in range(_ROUNDS):
        nearest = (2 * x @ centre.T - centre.square().sum(1)).argmax(1)
        centre = torch.stack([x[nearest == g].mean(0) if (nearest == g).any() else centre[g] for g in range(groups)])
    return mean_router([centre[g : g + 1] for g in range(groups)], x)


def mean_router(inputs: list[torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    """Router with a row for each set of tokens: their mean input, less the mean of all rows."""
    rows = torch.stack([each.double().mean(0) for each in inputs])
    return _scaled(rows - rows.mean(0), x_TD.double())


def _scaled(weight_ED: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    deviation = (x_TD @ weight_ED.T).std(1, correction=0).mean()
    return (weight_ED * (_LOGIT_STD / deviation if deviation > 0 else 1.0)).float()
