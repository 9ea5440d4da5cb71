"""The algebra of the queries' bottleneck in float64: its loss, its full rank, its metric, and plain SVD beside it."""

import pytest
import torch

from hf_moe.model.attention_hf_moe import HfMoeAttention
from hf_moe.model.configuration_hf_moe import HfMoeConfig
from hf_moe.upcycling import source_attention
from hf_moe.upcycling.query_bottleneck import narrow, query_moments
from hf_moe.upcycling.random import Draws
from hf_moe.upcycling.source_attention import before_output

H, D = 4, 20
SIZES = {"more queries than inputs": 32, "fewer": 16}


def moments(size: int) -> torch.Tensor:
    """Random second moments, some directions far above others."""
    rows = torch.randn(2 * size, size).double() * torch.logspace(0, -2, size).double()
    rows = rows @ torch.linalg.qr(torch.randn(size, size).double()).Q
    return rows.T @ rows / len(rows)


def ridged(x: torch.Tensor) -> torch.Tensor:
    return x + torch.eye(len(x)).double() * x.diagonal().mean() * 1e-6


@pytest.mark.parametrize("numbers", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rank", [1, 7, 15])
def test_predicted_loss_is_the_measured_one_and_the_least(numbers, rank):
    torch.manual_seed(0)
    weight, inputs, metric = torch.randn(numbers, D + 1).double(), moments(D + 1), moments(numbers)
    made = narrow(weight, inputs, metric, rank)

    def loss(narrowed: torch.Tensor) -> torch.Tensor:
        lost = weight - narrowed
        return torch.trace(ridged(metric) @ lost @ ridged(inputs) @ lost.T)

    least, whole = loss(made.expand @ made.project @ weight), loss(torch.zeros_like(weight))
    assert abs(least - made.tail) <= 1e-10 * whole
    # Neither a step of both factors nor the inputs' share alone loses less.
    first = made.project @ weight
    for _ in range(5):
        a, b = (each + 1e-3 * each.norm() * torch.randn_like(each) for each in (first, made.expand))
        assert loss(b @ a) > least
    plain = narrow(weight, inputs, torch.eye(numbers).double(), rank)
    assert loss(plain.expand @ plain.project @ weight) > 1.05 * least


@pytest.mark.parametrize("numbers", SIZES.values(), ids=SIZES)
def test_at_full_rank_nothing_is_lost(numbers):
    """Not even in directions that the text did not have, nor a constant that the inputs do not reach."""
    torch.manual_seed(1)
    weight, rows = torch.randn(numbers, D + 1).double(), torch.randn(5, D + 1).double()
    made = narrow(weight, rows.T @ rows, moments(numbers), min(D + 1, numbers))
    assert (made.expand @ made.project @ weight - weight).abs().max() <= 1e-8 * weight.abs().max()


@pytest.mark.parametrize("rank", [4, 8, 12])
def test_scores_err_less_than_after_a_truncated_svd(rank):
    """Errors (δq · k)² of all heads, on inputs and keys that nothing was learnt from."""
    torch.manual_seed(2)
    width, tokens = 8, 4000
    mixed_x, mixed_k = (moments(D) @ torch.randn(D, D).double(), torch.randn(H, width, width).double())
    mixed_k = mixed_k * torch.logspace(0, -2, width).double()
    weight = torch.randn(H * width, D + 1).double()

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([torch.randn(tokens, D).double() @ mixed_x, torch.ones(tokens, 1)], dim=1)
        return x, torch.einsum("lhd,hde->lhe", torch.randn(tokens, H, width).double(), mixed_k.mT)

    x, key = draw()
    metric = torch.block_diag(*torch.einsum("lhd,lhe->hde", key, key) / tokens)
    ours = narrow(weight, x.T @ x / tokens, metric, rank)
    svd = narrow(weight, torch.eye(D + 1).double(), torch.eye(H * width).double(), rank)
    x, key = draw()
    errors = []
    for made in (ours, svd):
        lost = x @ (weight - made.expand @ made.project @ weight).T
        errors.append((lost.unflatten(1, (H, width)) * key).sum(-1).square().mean())
    assert errors[0] < errors[1] / 2
    assert errors[0] == pytest.approx(ours.tail / H, rel=0.2)


@pytest.mark.parametrize("changes", [{"qk_nope_head_dim": 6}, {"qk_norm": "head"}, {"attn_logit_softcapping": 2.0}])
def test_metric_is_that_of_the_gradients_of_queries(monkeypatch, changes):
    """By autograd through scores, RoPE and norms; the softmax at its own temperature."""
    torch.manual_seed(3)
    monkeypatch.setattr(source_attention, "TEMPERATURE", 1.0)
    sizes = {"qk_nope_head_dim": 0, "qk_rope_head_dim": 4, "v_head_dim": 5, "kv_lora_rank": 7, "kv_a_layernorm": False}
    sizes |= {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": 1, "q_lora_rank": None}
    config = HfMoeConfig(num_hidden_layers=1, q_bias=True, **sizes | changes)
    attention = HfMoeAttention(config, 0).double().eval()
    inputs, angles = torch.randn(2, 1, 9, D).double(), torch.arange(9)[:, None] * torch.tensor([1.0, 0.3])
    rope = tuple(each.double().repeat(1, 2)[None] for each in (angles.cos(), angles.sin()))
    rows = torch.randn(attention.q_proj.out_features, 11).double()

    expected, directions = torch.zeros(11, 11).double(), Draws("seed")
    found = [torch.empty(0)]
    attention.q_proj.register_forward_hook(lambda module, x, query: found.append(query))
    for b, x in enumerate(inputs):
        noise = directions.draw(b, x[0].shape)
        out = attention.o_proj(before_output(attention, x, rope, None))
        g = torch.autograd.grad((out[0] * noise).sum(), found[-1])[0][0] @ rows
        expected += g.T @ g / 18
    with torch.no_grad():
        moments_XX, metric = query_moments(attention, rows, inputs, rope, None, "seed")
    assert (metric - expected).abs().max() <= 1e-10 * expected.abs().max()
    with_one = torch.cat([inputs.flatten(0, 2), torch.ones(18, 1)], dim=1)
    assert (moments_XX - with_one.T @ with_one / 18).abs().max() <= 1e-12
