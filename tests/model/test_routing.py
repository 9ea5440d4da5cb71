"""The router against a loop over its docstring, its gradient, and the balance losses."""

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model

from hf_moe.model.routing_hf_moe import (
    HfMoeTopkRouter,
    auxiliary_loss,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)


def chosen_by_loop(router: HfMoeTopkRouter, scores: torch.Tensor) -> list[set[int]]:
    """The docstring's selection for each token, with sorted lists."""
    bias = router.e_score_correction_bias if router.topk_method == "noaux_tc" else torch.zeros(router.num_experts)
    result = []
    for row in (scores + bias).tolist():
        candidates = range(router.num_experts)
        if router.topk_each_group:
            size, each = router.num_experts // router.n_group, router.top_k // router.n_group
            groups = [sorted(range(g * size, (g + 1) * size), key=lambda e: -row[e]) for g in range(router.n_group)]
            result.append({e for g in groups for e in g[:each]})
            continue
        if router.topk_method != "greedy":
            size = router.num_experts // router.n_group
            groups = [list(range(g * size, (g + 1) * size)) for g in range(router.n_group)]
            best = 2 if router.topk_method == "noaux_tc" else 1
            groups.sort(key=lambda g: -sum(sorted((row[e] for e in g), reverse=True)[:best]))
            candidates = [e for g in groups[: router.topk_group] for e in g]
        result.append(set(sorted(candidates, key=lambda e: -row[e])[: router.top_k]))
    return result


EACH_GROUP = {"n_routed_experts": 12, "num_experts_per_tok": 6, "n_group": 3, "topk_each_group": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v3", {}),
        ("deepseek_v2", {}),
        ("gqa", {}),
        ("gqa", {"num_experts_per_tok": 1}),
        ("gqa", EACH_GROUP),
        ("deepseek_v3", EACH_GROUP),
        ("gqa", {**EACH_GROUP, "num_experts_per_tok": 3}),
        ("deepseek_v3", {**EACH_GROUP, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    ],
)
def test_router_is_its_formula_and_has_its_gradient(name, changes):
    torch.manual_seed(0)
    router = HfMoeTopkRouter(tiny_config(name, **changes))
    torch.nn.init.normal_(router.weight)
    if router.topk_method == "noaux_tc":
        router.e_score_correction_bias.normal_()
    x = torch.randn(23, router.hidden_dim, requires_grad=True)
    logits, weights, index = router(x)
    assert [set(row) for row in index.tolist()] == chosen_by_loop(router, router.scores(logits))

    truth = (x @ router.weight.T).double()
    truth = truth.sigmoid() if router.scoring_func == "sigmoid" else truth.softmax(-1)
    truth = truth.gather(1, index)
    if router.norm_topk_prob:
        group = index // (router.num_experts // router.n_group) if router.topk_each_group else torch.zeros_like(index)
        same = (group[:, :, None] == group[:, None, :]).double()
        total = (same @ truth[:, :, None]).squeeze(-1)
        truth = truth / (total.detach() if same.sum() == same.shape[0] * router.top_k else total)
    truth = truth * router.routed_scaling_factor
    torch.testing.assert_close(weights.double(), truth, rtol=1e-5, atol=1e-6)

    upstream = torch.randn_like(weights)
    got = torch.autograd.grad((weights * upstream).sum(), (x, router.weight), retain_graph=True)
    want = torch.autograd.grad((truth * upstream).sum(), (x, router.weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_logits_are_float32_in_a_bfloat16_model():
    router = HfMoeTopkRouter(tiny_config()).to(torch.bfloat16)
    torch.nn.init.normal_(router.weight)
    logits, weights, _ = router(torch.randn(4, router.hidden_dim, dtype=torch.bfloat16))
    assert logits.dtype == weights.dtype == torch.float32


def test_load_balancing_loss_at_its_extremes():
    even = torch.full((8, 4), 0.25)
    index = torch.arange(8).unsqueeze(1) % 4
    assert load_balancing_loss(even, index, None).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert load_balancing_loss(collapsed, torch.zeros(8, 1, dtype=torch.long), None).item() == pytest.approx(4.0)


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    logits = torch.randn(10, 6)
    scores, index, mask = logits.softmax(-1), logits.topk(2).indices, torch.tensor([1.0] * 7 + [0.0] * 3)
    expected = load_balancing_loss(scores[:7], index[:7], None)
    torch.testing.assert_close(load_balancing_loss(scores, index, mask), expected)
    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(logits[:7], None))
    assert load_balancing_loss(scores, index, torch.zeros(10)).item() == 0.0


def test_sequence_loss_is_the_mean_over_sequences():
    torch.manual_seed(0)
    logits = torch.randn(12, 6)
    scores, index = logits.softmax(-1), logits.topk(2).indices
    for mask in (None, torch.tensor([1.0] * 9 + [0.0] * 3)):
        halves = [
            load_balancing_loss(scores[half], index[half], None if mask is None else mask[half])
            for half in (slice(6), slice(6, 12))
        ]
        torch.testing.assert_close(sequence_balancing_loss(scores, index, 2, mask), torch.stack(halves).mean())


def test_a_token_counts_once_whatever_its_mask_calls_it():
    config = tiny_config("gqa", router_z_loss_coef=0.1, router_seq_aux_loss_coef=0.1)
    router, logits = HfMoeTopkRouter(config), torch.randn(12, config.n_routed_experts)
    numbered = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 2, 3]])
    plain, same, also = (
        auxiliary_loss(config, [router], (logits,), 2, mask) for mask in (numbered.clamp(max=1), numbered, numbered > 0)
    )
    assert plain == same == also


def test_auxiliary_loss_reaches_the_router_and_respects_its_coefficients():
    model = tiny_model("gqa", router_aux_loss_coef=0.5, router_seq_aux_loss_coef=0.25, router_z_loss_coef=0.125)
    ids = random_ids(2, 9)
    out = model(ids, output_router_logits=True)
    routers = [layer.mlp.gate for layer in model.model.layers[1:]]
    expected = torch.zeros(())
    for router, logits in zip(routers, out.router_logits, strict=True):
        scores = router.scores(logits)
        index = router.select(scores)[1]
        expected = expected + 0.5 * load_balancing_loss(scores, index, None) / 2
        expected = expected + 0.25 * sequence_balancing_loss(scores, index, 2, None) / 2
        expected = expected + 0.125 * router_z_loss(logits, None) / 2
    total = auxiliary_loss(model.config, routers, out.router_logits, 2)
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers)


def test_loss_has_the_auxiliary_part_in_training_only():
    model, ids = tiny_model("gqa", router_aux_loss_coef=0.5), random_ids(2, 9)
    evaluated = model(ids, labels=ids)
    assert evaluated.aux_loss is None
    assert evaluated.router_logits is None
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, evaluated.loss + trained.aux_loss)


def test_an_optimizer_step_counts_auxiliary_losses_once():
    """Sequence and z-loss are means over tokens, so eight micro-batches give the whole batch's loss and gradient."""
    model = tiny_model("gqa", router_aux_loss_coef=0.0, router_seq_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    ids, items = random_ids(8, 9), torch.tensor(8 * 8)
    whole = model(ids, labels=ids, num_items_in_batch=items)
    parts = [model(ids[i : i + 1], labels=ids[i : i + 1], num_items_in_batch=items).loss for i in range(8)]
    torch.testing.assert_close(sum(parts), whole.loss)
    router = model.model.layers[1].mlp.gate.weight
    (expected,) = torch.autograd.grad(whole.loss, router)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), router)[0], expected)


def test_load_loss_of_micro_batches_is_their_mean():
    model, ids = tiny_model("gqa", router_aux_loss_coef=0.5).train(), random_ids(8, 9)
    parts = [model(ids[i : i + 1], labels=ids[i : i + 1], num_items_in_batch=torch.tensor(64)).loss for i in range(8)]
    aux = [model(ids[i : i + 1], labels=ids[i : i + 1]).aux_loss for i in range(8)]
    cross_entropy = model.eval()(ids, labels=ids).loss
    torch.testing.assert_close(sum(parts), cross_entropy + torch.stack(aux).mean())


def test_logits_are_float32_under_autocast():
    router = HfMoeTopkRouter(tiny_config())
    torch.nn.init.normal_(router.weight)
    x = torch.randn(4, router.hidden_dim)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x)[0]
    assert torch.equal(logits, router(x)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_routers_gradient_or_says_that_it_cannot(use_reentrant):
    model, ids = tiny_model("gqa", router_aux_loss_coef=0.5).train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = model.model.layers[1].mlp.gate.weight.grad.clone()
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    if use_reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            model(ids, labels=ids)
    else:
        model(ids, labels=ids).loss.backward()
        torch.testing.assert_close(model.model.layers[1].mlp.gate.weight.grad, expected)


def test_generate_with_router_logits_and_a_static_cache():
    model, ids = tiny_model("sandwich", output_router_logits=True), random_ids(1, 5)
    model.generate(ids, max_new_tokens=3, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize(
    ("variant", "losses", "message"),
    [
        ("gqa", {"router_aux_loss_coef": 0.1}, None),
        ("gqa", {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}, None),
        ("deepseek_v3", {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 .* greedy softmax router"),
        ("gqa", {"router_aux_loss_coef": 0.1, **EACH_GROUP}, "this one is softmax greedy topk_each_group"),
        ("gqa", {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.2}, "router_z_loss_coef=0.2 would be left out"),
        ("gqa", {"router_aux_loss_coef": 0.1, "router_seq_aux_loss_coef": 0.2}, "router_seq_aux_loss_coef=0.2 would"),
    ],
)
def test_a_trainer_that_asks_the_base_model_for_router_logits_computes_all_losses_or_is_refused(
    variant, losses, message
):
    model, ids = tiny_model(variant, **losses).train(), random_ids(2, 9)
    model(ids, labels=ids, output_router_logits=True)
    if message is None:
        assert model.model(ids, output_router_logits=True).router_logits
    else:
        with pytest.raises(ValueError, match=message):
            model.model(ids, output_router_logits=True)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"modules_to_save": ["gate"]}, "gate.modules_to_save.default.weight"),
        ({"modules_to_save": ["mlp"]}, "mlp.modules_to_save.default.gate.weight"),
        ({"target_parameters": ["gate.weight"]}, "gate.lora_B.default.weight"),
    ],
)
def test_a_router_that_peft_trains_beside_its_original(options, trained):
    from peft import LoraConfig, get_peft_model

    ids = random_ids(2, 9)
    expected = tiny_model(router_aux_loss_coef=0.5).train()(ids, labels=ids)
    config = LoraConfig(r=2, target_modules=["o_proj"], **options)
    model = get_peft_model(tiny_model(router_aux_loss_coef=0.5), config).train()
    found = model(ids, labels=ids)
    torch.testing.assert_close((found.loss, found.aux_loss), (expected.loss, expected.aux_loss))
    found.aux_loss.backward()
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith(trained)]
    assert len(gates) == 2
    assert all(gate.grad.any() for gate in gates)


def test_labels_that_somebody_takes_away_take_the_routers_losses_with_them():
    ids, count = random_ids(2, 9), torch.tensor(16)
    with pytest.raises(ValueError, match="label smoothing"):
        tiny_model(router_aux_loss_coef=0.5).train()(ids, num_items_in_batch=count)
    tiny_model(router_aux_loss_coef=0.0, router_seq_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()(
        ids, num_items_in_batch=count
    )
    tiny_model(router_aux_loss_coef=0.5).eval()(ids, num_items_in_batch=count)
