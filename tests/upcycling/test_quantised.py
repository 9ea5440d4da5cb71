"""Sources in 8-bit numbers: read as the numbers they stand for, converted and verified."""

import json

import pytest
import torch
from dense import dense_model, save_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_moe.upcycling import open_source, upcycle, verify

BLOCK = 32


def quantise(folder, style):
    """Store the projections of a saved model in 8 bits; returns the numbers they stand for, by name."""
    path = folder / "model.safetensors"
    stored, meaning = {}, {}
    for name, weight in load_file(path).items():
        if "proj" not in name:
            stored[name] = meaning[name] = weight
            continue
        rows, columns = weight.shape
        if style == "blocks":
            scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK)) / 100 + 0.01
            whole = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        else:
            scale = torch.rand(rows, 1) / 100 + 0.01 if style == "rows" else torch.tensor([0.02])
            whole = scale
        stored[name] = (weight / whole).to(torch.float8_e4m3fn)
        stored[name + ("_scale_inv" if style == "blocks" else "_scale")] = scale
        meaning[name] = stored[name].float() * whole
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if style == "blocks":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    else:
        config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    return meaning


@pytest.mark.parametrize("style", ["blocks", "rows", "tensor"])
@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_read_convert_verify(tmp_path, name, style):
    folder = save_dense(tmp_path / "dense", name)
    meaning = quantise(folder, style)
    source = open_source(folder)
    assert set(source.headers) == set(meaning)
    for key, weight in meaning.items():
        assert torch.equal(source.read(key), weight)
        assert torch.equal(source.read(key, 5, 40), weight[5:40])
    target = upcycle(folder, tmp_path / "moe", experts=3, progress=False)
    certificate = verify(folder, target, tokens=60, new_tokens=4, progress=False)
    assert certificate["logits"]["max_abs_difference"] <= 1e-5

    dense = dense_model(name)
    dense.load_state_dict(meaning)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        difference = AutoModelForCausalLM.from_pretrained(target)(ids).logits - dense(ids).logits
    assert difference.abs().max() <= 1e-5


def test_missing_scale_wrong_scale_and_other_methods(tmp_path):
    folder = save_dense(tmp_path / "dense")
    quantise(folder, "blocks")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight is F8_E4M3 without a scale"):
        open_source(folder)
    save_file({**tensors, f"{name}_scale_inv": scale[:1]}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"a scale of shape \[1, 2\] does not fit blocks \[32, 32\]: \[2, 2\] is needed"
    ):
        upcycle(folder, tmp_path / "moe", progress=False)
    assert not list(tmp_path.glob("*moe*"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights quantised by hqq are not read; known are fp8, compressed-tensors"):
        open_source(folder)
