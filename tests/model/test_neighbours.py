"""Quantisers of others, where they are installed: they take linear layers, and leave fused experts and the router."""

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

# Of these libraries about themselves, and about each other.
pytestmark = pytest.mark.filterwarnings("default")


def eight_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bits():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def torchao(name):
    return lambda: TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)())


QUANTISERS = {
    "bitsandbytes int8": (eight_bits, 0.1),
    "bitsandbytes nf4": (four_bits, 0.5),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), 0.1),
    "torchao int8 activations": (torchao("Int8DynamicActivationInt8WeightConfig"), 0.1),
    "torchao float8": (torchao("Float8WeightOnlyConfig"), 0.2),
}


@torch.no_grad()
@pytest.mark.parametrize(("make", "error"), QUANTISERS.values(), ids=QUANTISERS)
def test_linear_layers_are_quantised_and_experts_are_not(make, error, tmp_path):
    # Every expert is chosen: no small error makes a token change experts.
    model, ids = tiny_model("gqa", hidden_size=128, num_experts_per_tok=5).bfloat16(), random_ids(2, 11)
    model.save_pretrained(tmp_path / "plain")
    options = {"dtype": torch.bfloat16, "device_map": "cpu"}
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=make(), **options)
    for name, module in quantised.named_modules():
        if isinstance(module, nn.Linear):
            assert (type(module.weight) is nn.Parameter) == (name == "lm_head"), name
    block = quantised.model.layers[1].mlp
    for weight in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight):
        assert type(weight) is nn.Parameter
        assert weight.dtype == torch.bfloat16

    expected, logits = model(ids).logits.float(), quantised(ids).logits.float()
    assert (logits - expected).norm() < error * expected.norm()
    assert quantised.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None).shape == (2, 17)

    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert again(ids).logits.float().equal(logits)
