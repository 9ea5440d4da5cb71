"""Export to one graph, as Transformers' exporter does it and as `torch.export` itself does."""

import pytest
import torch
from tiny import random_ids, tiny_model
from torch.export import Dim, export
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

pytestmark = pytest.mark.filterwarnings("default")  # of the exporter about itself


@torch.no_grad()
def test_transformers_exporter(variant):
    model, ids = tiny_model(variant), random_ids(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    program = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=True))
    other = random_ids(3, 17, seed=2)
    mask = torch.ones_like(other)
    mask[0, :4] = 0
    got = program(input_ids=other, attention_mask=mask)
    expected = model(other, attention_mask=mask)
    torch.testing.assert_close(got.logits[mask.bool()], expected.logits[mask.bool()], rtol=0, atol=2e-5)


@torch.no_grad()
def test_torch_export_takes_other_lengths_and_survives_a_file(variant, tmp_path):
    model = tiny_model(variant)
    model.set_experts_implementation("grouped_mm")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    shapes = {"input_ids": {0: Dim("batch", min=1, max=8), 1: Dim("length", min=2, max=64)}}
    program = export(Logits(), (random_ids(2, 12),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for ids in (random_ids(2, 12), random_ids(1, 7), random_ids(5, 31)):
        torch.testing.assert_close(loaded(ids), model(ids).logits, rtol=0, atol=2e-5)
