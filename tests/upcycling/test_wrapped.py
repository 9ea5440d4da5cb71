"""The language model of a model of more than text: taken out, the rest named."""

import json

import pytest
import torch
from dense import COMMON, DENSE, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_moe.upcycling import Options, make_plan, open_source, upcycle, verify
from hf_moe.upcycling.summary import summarise

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Wrapper → its language model among DENSE, and what the configuration needs beside.
WRAPPERS = {
    "gemma3": ("gemma3", {"mm_tokens_per_image": 4}),
    "llava": ("llama3", {}),
    "mistral3": ("mistral", {}),
}


def save_wrapped(folder, name):
    inner, extra = WRAPPERS[name]
    model_type, differences = DENSE[inner]
    text = {**COMMON, **differences, "model_type": model_type}
    torch.manual_seed(0)
    vision = VISION | ({"model_type": "clip_vision_model"} if name == "llava" else {})
    config = AutoConfig.for_model(name, text_config=text, vision_config=vision, **extra)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", WRAPPERS)
@torch.no_grad()
def test_text_of_a_wrapper_is_its_language_model(tmp_path, name):
    model = save_wrapped(tmp_path / "dense", name)
    source = open_source(tmp_path / "dense")
    assert source.left_out == ["multi_modal_projector", "vision_tower"]
    assert summarise(make_plan(source, Options(experts=3)), source)["source"]["left_out"] == source.left_out
    target = upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, progress=False)
    ids = random_ids()
    difference = AutoModelForCausalLM.from_pretrained(target)(ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() <= 1e-5
    card = (target / "README.md").read_text()
    assert "The language model only: left out are `multi_modal_projector`, `vision_tower`." in card
    assert verify(tmp_path / "dense", target, tokens=60, new_tokens=4, progress=False)["passed"]


def test_other_language_models_are_named(tmp_path):
    config = {"model_type": "gemma3", "text_config": {"model_type": "gpt2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'gemma3' is a model of more than text, .* architecture is 'gpt2'; known"):
        upcycle(tmp_path, tmp_path / "moe", progress=False)
