"""Healing: the chunked divergence against float64, padding that stays zero, training that comes nearer and resumes."""

import copy

import pytest
import torch
from tiny import random_ids, tiny_model

from hf_moe.training import divergence as module
from hf_moe.training.distillation import layer_distance, recorded
from hf_moe.training.divergence import Head, divergence, measure_agreement
from hf_moe.training.healing import Healing, compiled_layers, heal
from hf_moe.training.uniform import can_be_padded, copy_back, padded

# Trainer announces its own coming changes; a tiny run holds no GPU.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_divergence_and_its_gradients(monkeypatch, cap, tokens):
    monkeypatch.setattr(module, "CHUNK", 5)
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    source, source_weight = torch.randn(tokens, 4), torch.randn(11, 4)
    value = divergence(hidden, Head(weight, 2.0, cap), source, Head(source_weight, 1.0, None))
    (3 * value).backward()

    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_q = Head(w, 2.0, cap).logits(h).log_softmax(-1)
    log_p = (source.double() @ source_weight.double().T).log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum() / max(tokens, 1)
    (3 * truth).backward()
    assert value.item() == pytest.approx(truth.item(), abs=1e-6)
    torch.testing.assert_close(hidden.grad.double(), h.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, atol=1e-6, rtol=1e-5)


def test_agreement_is_that_of_the_logits():
    model, source, ids = tiny_model("sandwich"), tiny_model("sinks"), random_ids(3, 9)
    found = measure_agreement(model, source, ids, batch=2)
    with torch.no_grad():
        log_q, log_p = (each(ids).logits.double().log_softmax(-1) for each in (model, source))
    assert found.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), abs=1e-5)
    assert found.top1 == pytest.approx((log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item())
    for loss, logs in ((found.loss, log_q), (found.source_loss, log_p)):
        assert loss == pytest.approx(-logs[:, :-1].gather(-1, ids[:, 1:, None]).mean().item(), abs=1e-5)


def test_distance_of_layers():
    torch.manual_seed(0)
    states, truth = ([torch.randn(2, 3, 4) for _ in range(2)] for _ in range(2))
    expected = sum(((a - b).norm() / b.norm()).square() for a, b in zip(states, truth, strict=True)) / 2
    assert layer_distance(states, truth).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"cannot be compared with those of the source, \[\(2, 3, 4\)\]"):
        layer_distance(states, truth[:1])
    model, ids = tiny_model("gqa"), random_ids(1, 5)
    with recorded(model, layers=True) as seen, torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(seen) == len(states) - 1
    assert all(torch.equal(a, b) for a, b in zip(seen, states[1:], strict=True))


@pytest.mark.parametrize("changes", [{}, {"o_bias": True, "kv_bias": True, "softmax_scale": None, "v_head_dim": 40}])
def test_padding_computes_the_same_and_stays_zero(changes):
    model, ids = tiny_model("widths", **changes), random_ids(2, 12)
    assert can_be_padded(model.config)
    assert not can_be_padded(tiny_model("gqa").config)
    wide = padded(model)
    assert not can_be_padded(wide.config)
    assert wide.config.qk_head_dim % 8 == 0
    assert wide.config.v_head_dim == max(model.config.v_head_dim, wide.config.qk_head_dim)
    assert (wide(ids).logits - model(ids).logits).abs().max() <= 1e-5
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        wide(ids, labels=ids).loss.backward()
        optimizer.step()
    copy_back(wide, model)
    assert (wide(ids).logits - model(ids).logits).abs().max() <= 1e-5


def damaged(source):
    model = copy.deepcopy(source)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".self_attn." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


CASES = {
    "attention": ("widths", {"train": "attention"}),
    "all": ("gqa", {"train": "all", "learning_rate": 3e-3}),
    "layers": ("gqa", {"train": "attention", "layer_weight": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_model_heals(tmp_path, case):
    variant, choices = CASES[case]
    source, rows = tiny_model(variant), random_ids(96, 16)
    model, held_out = damaged(source), random_ids(16, 16, seed=2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".self_attn." not in n}
    before = measure_agreement(model, source, held_out)
    options = Healing(**{"tokens": 40 * 128, "length": 16, "batch": 8, "learning_rate": 3e-3, **choices})
    curve = heal(model, source, rows, options, tmp_path)
    after = measure_agreement(model.eval(), source, held_out)
    assert after.kl <= 0.6 * before.kl
    assert curve[-1][0] == 40 * 128
    if choices["train"] == "attention":
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_resumed_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    source, rows = tiny_model("widths"), random_ids(40, 8)
    options = Healing(tokens=6 * 32, length=8, batch=4, save_steps=3, train="all", seed=5)
    whole = damaged(source)
    heal(whole, source, rows, options, tmp_path / "whole")

    def stop(step, steps, loss):
        if step == 4:
            raise KeyboardInterrupt

    broken, again = damaged(source), damaged(source)
    with pytest.raises(KeyboardInterrupt):
        heal(broken, source, rows, options, tmp_path / "broken", report=stop)
    # The newest checkpoint was cut off in the middle of its writing.
    (tmp_path / "broken" / "checkpoint-5").mkdir()
    (tmp_path / "broken" / "checkpoint-5" / "trainer_state.json").write_text("{")
    curve = heal(again, source, rows, options, tmp_path / "broken", resume=True)
    assert [tokens for tokens, _ in curve] == [32 * step for step in range(1, 7)]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)

    # Interrupted after the last step, no step is made.
    finished = damaged(source)
    assert heal(finished, source, rows, options, tmp_path / "broken", resume=True) == curve
    for a, b in zip(whole.parameters(), finished.parameters(), strict=True):
        assert torch.equal(a, b)


def test_compiled_layers_are_let_go(monkeypatch):
    model, ids = tiny_model("gqa"), random_ids(1, 5)
    with torch.no_grad():
        before = model(ids).logits
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with compiled_layers(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (model(ids).logits - before).abs().max() > 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"train": "mlp"}, "train='mlp' is unknown; known are attention, all"),
        ({"tokens": 100}, "tokens=100 must be at least 16384"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number"),
        ({"length": 1}, "length=1 must be at least 2"),
    ],
)
def test_bad_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        Healing(**choices)


def test_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 99 is not the source's of 50"):
        heal(tiny_model(), tiny_model(vocab_size=50), random_ids(40, 512), Healing(), tmp_path)
