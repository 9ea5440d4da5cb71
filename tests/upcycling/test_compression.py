"""The algebra of compressed attention in float64 on random numbers: rotation, absorption, truncation, budget."""

import pytest
import torch

from hf_moe.upcycling import statistics as statistics_module
from hf_moe.upcycling.budget import Candidate, allocate, frontier, uniform
from hf_moe.upcycling.factors import Weights, candidates, compress_layer, factor, latent_rows, refit
from hf_moe.upcycling.random import Draws, generator
from hf_moe.upcycling.rotation import Rotation, as_pairs, counter_rotated, gather, root_of, shared_keys, unrotated
from hf_moe.upcycling.statistics import Heads, Reader, Statistics, measure

H, G, F, V, D = 6, 3, 4, 8, 40
HEADS = Heads(H, G, keys=True)


def positive(*shape: int, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    """Random positive Hermitian matrices."""
    matrix = torch.randn(*shape, shape[-1], dtype=dtype)
    return matrix @ matrix.mH


def random_layer() -> tuple[Weights, Statistics]:
    torch.manual_seed(0)
    rows = (H * 2 * F, G * 2 * F, G * V)
    weights = Weights(*(torch.randn(n, D + 1).double() for n in rows), torch.randn(D, H * V + 1).double())
    rotation = gather(positive(F, G), positive(F, G))
    size = 2 * F * G + G * V
    turn = torch.randn(H, F * G, dtype=torch.complex128)
    statistics = Statistics(
        rotation,
        turn,
        torch.rand(F * G).double(),
        positive(size, dtype=torch.float64),
        positive(size, dtype=torch.float64),
        torch.randn(size).double(),
    )
    return weights, statistics


def rope(z: torch.Tensor, position: int, frequency: torch.Tensor) -> torch.Tensor:
    return z * torch.polar(torch.ones_like(frequency), position * frequency)


@pytest.mark.parametrize("rotate", [True, False])
def test_rotation_leaves_scores_unchanged_and_commutes_with_rope(rotate):
    weights, statistics = random_layer()
    rotation = statistics.rotation if rotate else unrotated(F, G, torch.device("cpu"))
    frequency, x, y = torch.rand(F).double(), torch.randn(D + 1).double(), torch.randn(D + 1).double()
    queries, keys = as_pairs(weights.query @ x, H), as_pairs(weights.key @ y, G)
    pairs = torch.arange(F * G)
    turned = counter_rotated(rotation, weights.query, H, pairs) @ x
    turned = torch.complex(*turned.unflatten(1, (2, -1)).unbind(1))
    z = shared_keys(rotation, weights.key) @ y.to(torch.complex128)
    for m, n in ((0, 0), (5, 2), (117, 3)):
        expected = (rope(queries, m, frequency).conj() * rope(keys, n, frequency)[HEADS.group]).sum(-1).real
        each = frequency[pairs // G]
        score = (rope(turned, m, each).conj() * rope(z, n, each)).sum(-1).real
        assert (score - expected).abs().max() <= 1e-12 * expected.abs().max()
        # First turned by position, then mixed across heads, or the other way round.
        mixed = torch.einsum("fjg,gf->fj", rotation.into, rope(keys, n, frequency)).flatten()
        assert (mixed - rope(z, n, each)).abs().max() <= 1e-12 * z.abs().max()


def test_energy_gathers_in_the_first_pairs():
    torch.manual_seed(1)
    covariance, metric = positive(F, G), positive(F, G)
    rotation = gather(covariance, metric)
    energy = (rotation.into @ covariance @ rotation.into.mH).diagonal(dim1=1, dim2=2).real
    cost = (rotation.out.mH @ metric @ rotation.out).diagonal(dim1=1, dim2=2).real
    assert ((energy * cost).diff(dim=1) <= 0).all()
    root, inverse = root_of(metric)
    assert (root @ root - metric).abs().max() <= 1e-12 * metric.abs().max()
    assert (root @ inverse - torch.eye(G)).abs().max() <= 1e-10
    assert (rotation.out @ rotation.into - torch.eye(G)).abs().max() <= 1e-12


@pytest.mark.parametrize(("pairs", "latent"), [(1, 5), (3, 20), (12, 11), (12, 24), (2, 44)])
def test_predicted_truncation_error_is_the_measured_one(pairs, latent):
    _, statistics = random_layer()
    kept = torch.randperm(F * G)[:pairs]
    made = factor(statistics, kept, latent)
    lost = torch.eye(len(made.index)).double() - made.expand @ made.project
    covariance, metric = (m[made.index][:, made.index] for m in (statistics.covariance_YY, statistics.metric_YY))
    metric = metric + torch.eye(len(metric)) * metric.diagonal().mean() * 1e-6
    measured = torch.trace(metric @ lost @ covariance @ lost.T)
    whole = torch.trace(metric @ covariance)
    assert abs(measured - made.tail) <= 1e-10 * whole
    table = {(c.pairs, c.latent): c for c in candidates(statistics, 0, pairs)}
    order = statistics.without_rope_J.argsort(descending=True)[:pairs]
    best = factor(statistics, order, latent)
    rest = statistics.without_rope_J.sum() - statistics.without_rope_J[order].sum()
    assert abs(table[pairs, latent].damage - best.tail - rest) <= 1e-10 * whole
    # No other factorisation of that width loses less.
    other = torch.linalg.qr(torch.randn(len(lost), latent).double()).Q
    lost = torch.eye(len(lost)).double() - other @ other.T
    assert torch.trace(metric @ lost @ covariance @ lost.T) >= measured - 1e-12 * whole


def test_the_latent_at_full_width_gives_keys_and_values_and_absorbs():
    """Values are the source's; keys of pairs without RoPE are turned by c; W_uk goes into the query."""
    weights, statistics = random_layer()
    kept = torch.tensor([1, 4, 7])
    latent = factor(statistics, kept, 2 * (F * G - 3) + G * V)
    tensors = compress_layer(HEADS, weights, statistics, kept, latent)
    x = torch.randn(7, D).double()
    with_one = torch.cat([x, torch.ones(7, 1)], dim=1)
    cached = with_one @ tensors["kv_a_proj_with_mqa"].T
    c, rotary = cached.split([len(latent.project), 6], dim=1)
    w_uk, w_uv = tensors["kv_b_proj"].unflatten(0, (H, -1)).split([2 * F, V], dim=1)
    out = torch.einsum("hvc,lc->lhv", w_uv, c).flatten(1) @ tensors["o_proj"][:, :-1].T + tensors["o_proj"][:, -1]
    value = (with_one @ weights.value.T).unflatten(1, (G, V))[:, HEADS.group].flatten(1)
    expected = value @ weights.output[:, :-1].T + weights.output[:, -1]
    assert (out - expected).abs().max() <= 1e-9 * expected.abs().max()

    z = with_one.to(torch.complex128) @ shared_keys(statistics.rotation, weights.key).T
    assert (torch.complex(rotary[:, :3], rotary[:, 3:]) - z[:, kept]).abs().max() <= 1e-12 * z.abs().max()
    query = (with_one @ tensors["q_proj"].T).unflatten(1, (H, -1))[..., : 2 * F]
    free = torch.ones(F * G, dtype=torch.bool)
    free[kept] = False
    group_out = statistics.rotation.out[:, HEADS.group].transpose(0, 1)
    factors = group_out * statistics.turn_HJ.unflatten(1, (F, G)) * free.view(F, G)
    bias = z - x.to(torch.complex128) @ shared_keys(statistics.rotation, weights.key)[:, :-1].T
    key = torch.einsum("hfj,lfj->lhf", factors, (z - bias).unflatten(1, (F, G)))
    pairs = as_pairs(query.flatten(1), H)
    expected = (pairs[:, None].conj() * key[None]).sum(-1).real
    expanded = torch.einsum("mhn,hnc,lc->mlh", query, w_uk, c)
    absorbed = torch.einsum("mhc,lc->mlh", torch.einsum("mhn,hnc->mhc", query, w_uk), c)
    assert (expanded - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert (absorbed - expanded).abs().max() <= 1e-12 * expanded.abs().max()


def test_keys_that_stay_leave_the_values_alone():
    weights, statistics = random_layer()
    only = Heads(H, G, keys=False)
    size = G * V
    values = Statistics(
        Rotation(statistics.rotation.out[:0], statistics.rotation.into[:0]),
        statistics.turn_HJ[:, :0],
        statistics.without_rope_J[:0],
        statistics.covariance_YY[:size, :size],
        statistics.metric_YY[:size, :size],
        statistics.mean_Y[:size],
    )
    assert latent_rows(only, weights, values) is weights.value
    sizes = candidates(values, fixed=24)
    assert [(c.numbers, c.pairs, c.latent) for c in sizes] == [(24 + c, 0, c) for c in range(1, size + 1)]
    tensors = compress_layer(only, weights, values, torch.arange(0), factor(values, torch.arange(0), 5))
    assert tensors["q_proj"] is weights.query
    assert torch.equal(tensors["kv_a_proj_with_mqa"][5:], weights.key)
    assert tensors["kv_b_proj"].shape == (H * V, 5)


@pytest.mark.parametrize("rotate", [True, False])
def test_moments_are_those_of_gradients_of_the_whole_text(monkeypatch, rotate):
    """γ and what reaches keys and values by autograd; c and the losses by least squares over all tokens at once."""
    torch.manual_seed(3)
    monkeypatch.setattr(statistics_module, "_AT_ONCE", H * 9 * 5)
    B, S = 3, 9
    query, key, value, back = (torch.randn(B, S, n) for n in (H * 2 * F, G * 2 * F, G * V, H * V))
    phase = torch.polar(torch.ones(S, F), torch.arange(S)[:, None] * torch.rand(F))
    scores = torch.randn(B, H, S, S).double() + torch.full((S, S), -1e9).triu(1)
    scores.requires_grad_()
    weights, values = scores.softmax(-1), value.double().requires_grad_()
    heads_of_values = values.unflatten(-1, (G, V))[:, :, HEADS.group]
    out = torch.einsum("bhml,blhd->bmhd", weights, heads_of_values).flatten(2)
    gamma, values_back = torch.autograd.grad((out * back).sum(), (scores, values))

    reader = Reader(
        B,
        lambda b: (query[b], key[b], value[b], back[b]),
        lambda b: (weights[b].detach().float(), weights[b].detach().float(), torch.ones(())),
        phase,
    )
    found = measure(HEADS, reader, rotate)
    z = torch.einsum("fjg,bsgf->bsfj", found.rotation.into, as_pairs(key.double(), G)).flatten(2)
    factor = found.rotation.out[:, HEADS.group].conj().transpose(0, 1).flatten(1)
    seen = as_pairs(query.double(), H).repeat_interleave(G, dim=3) * factor
    turned = phase.repeat_interleave(G, dim=1).to(z.dtype)
    with_rope = torch.einsum("bhml,bmhj,mj,blj,lj->bmhj", gamma.to(z.dtype), seen.conj(), turned.conj(), z, turned).real
    without = torch.einsum("bhml,bmhj,blj->bmhj", gamma.to(z.dtype), seen.conj(), z)
    for h in range(H):
        for j in range(F * G):
            rows = torch.stack([without[..., h, j].real, -without[..., h, j].imag], dim=-1).flatten(0, 1)
            c = torch.linalg.lstsq(rows, with_rope[..., h, j].flatten()).solution
            assert abs(torch.complex(*c) - found.turn_HJ[h, j]) <= 1e-4
    lost = (with_rope - (without * found.turn_HJ).real).sum(2).square().sum((0, 1)) / (B * S)
    assert ((lost - found.without_rope_J).abs() <= 1e-5 * lost.max()).all()

    parts = torch.view_as_real(z).flatten(2).requires_grad_()
    pairs = torch.view_as_complex(parts.unflatten(-1, (-1, 2)))
    score = torch.einsum("bmhj,hj,blj->bhml", seen.conj(), found.turn_HJ, pairs).real
    (keys_back,) = torch.autograd.grad((score * gamma).sum(), parts)
    reached = torch.cat([keys_back, values_back], dim=-1).flatten(0, 1)
    metric = reached.T @ reached / len(reached)
    assert (found.metric_YY - metric).abs().max() <= 1e-5 * metric.abs().max()
    ridge = torch.eye(len(metric)) * metric.diagonal().mean() * 1e-3
    weight = (torch.linalg.solve(metric + ridge, reached.T).T * reached).sum(1)
    weight = weight / weight.sum()
    y = torch.cat([parts.detach(), value.double()], dim=-1).flatten(0, 1)
    mean = weight @ y
    assert (found.mean_Y - mean).abs().max() <= 1e-4 * y.abs().max()
    covariance = ((y - mean) * weight[:, None]).T @ (y - mean)
    assert (found.covariance_YY - covariance).abs().max() <= 1e-4 * covariance.abs().max()


def test_parts_of_a_draw_come_again():
    whole = torch.randn(4, 8, 6, generator=generator("seed"))
    draws = Draws("seed")
    for part in (2, 0, 0, 3, 1, 2):
        assert torch.equal(draws.draw(part, torch.Size((8, 6))), whole[part])


def test_output_is_fitted_by_least_squares():
    torch.manual_seed(2)
    read, output = torch.randn(90, 12).double(), torch.randn(5, 12).double()
    wanted = torch.randn(90, 5).double()
    fitted = refit(output, read.T @ read, read.T @ (wanted - read @ output.T), 0.0)
    assert (read.T @ (wanted - read @ fitted.T)).abs().max() <= 1e-10
    assert (refit(output, read.T @ read, read.T @ (wanted - read @ output.T), 1e9) - output).abs().max() <= 1e-6


def test_budget_goes_where_it_helps_most():
    steep = [Candidate(n, 1, n - 2, 100.0 / n) for n in range(3, 20)]
    flat = [Candidate(n, 1, n - 2, 1.0 / n) for n in range(3, 20)]
    chosen = allocate([steep, flat], 20)
    assert sum(c.numbers for c in chosen) == 20
    assert [c.numbers for c in chosen] == [17, 3]
    assert [c.numbers for c in allocate([steep, steep], 20)] == [10, 10]
    assert [c.numbers for c in uniform([steep, flat], 9)] == [9, 9]
    with pytest.raises(ValueError, match=r"5 numbers .* are below 6, the least"):
        allocate([steep, flat], 5)
    with pytest.raises(ValueError, match=r"2 numbers .* are below 3, the least"):
        uniform([steep, flat], 2)
    # What lies above the hull is no step of its own.
    points = [Candidate(1, 0, 1, 10.0), Candidate(2, 0, 2, 9.9), Candidate(3, 0, 3, 1.0), Candidate(4, 0, 4, 2.0)]
    assert [c.numbers for c in frontier(points)] == [1, 3]
