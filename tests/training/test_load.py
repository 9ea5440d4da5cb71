"""Expert load against a count by hand."""

import pytest
import torch
from tiny import random_ids, tiny_model

from hf_moe.training import measure_expert_load


def test_load_counts_every_choice_of_every_sparse_layer():
    model, ids = tiny_model("gqa"), random_ids(2, 9)
    with measure_expert_load(model) as load, torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    model(ids)
    expected = [torch.bincount(layer.topk(2).indices.flatten(), minlength=5) for layer in logits]
    assert torch.equal(load.counts, torch.stack(expected))
    assert load.counts.sum() == 2 * 18 * 2
    assert load.max_over_mean == pytest.approx(max(row.max().item() for row in expected) / (36 / 5))
    assert load.unused == pytest.approx((torch.stack(expected) == 0).float().mean().item())


def test_a_model_without_router_is_refused():
    with pytest.raises(ValueError, match="Linear has no experts"), measure_expert_load(torch.nn.Linear(2, 2)):
        pass
