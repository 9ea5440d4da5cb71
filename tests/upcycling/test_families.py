"""The table of families, read both ways."""

import pytest
from dense import DENSE, dense_model
from transformers.activations import ACT2FN

from hf_moe.upcycling.families import ACTIVATIONS, FAMILIES, family_of


@pytest.mark.parametrize("name", DENSE)
def test_names_and_roles_are_inverse(name):
    model = dense_model(name)
    config = model.config.to_dict()
    family = family_of(config)
    assert family.architecture == type(model).__name__
    for tensor, weight in model.state_dict().items():
        roles, layer, suffix = family.role_of(tensor)
        parts = [family.part(role, layer or 0, config, suffix) for role in roles]
        assert {part.name for part in parts} == {tensor}
        if len(parts) > 1:
            ends = [0, *(part.stop for part in parts)]
            assert [part.start for part in parts] == ends[:-1]
            assert ends[-1] == weight.shape[0]
    assert set(model.state_dict()) <= set(family.source_names(config["num_hidden_layers"]))


def test_foreign_names_have_no_role():
    llama = FAMILIES["llama"]
    for name in (
        "model.layers.0.mlp.gate_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.x.mlp.gate_proj.weight",
        "transformer.wte.weight",
        "lm_head.bias",
    ):
        assert llama.role_of(name) is None


def test_every_family_is_tested():
    assert {model_type for model_type, _ in DENSE.values()} == set(FAMILIES)


def test_every_activation_is_one_of_transformers():
    for name in ACTIVATIONS:
        assert not list(ACT2FN[name].parameters())
