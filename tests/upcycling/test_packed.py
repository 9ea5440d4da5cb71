"""Packed sources, written here number by number as the formats say, read as the numbers they stand for."""

import json

import numpy as np
import pytest
import torch
from dense import dense_model, save_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_moe.upcycling import open_source, upcycle, verify

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# name → method, bits, and how the packer deviates from the plainest case.
STYLES = {
    "gptq": ("gptq", 4, {}),
    "gptq 8 bits, one group": ("gptq", 8, {"group": None}),
    "gptq 2 bits": ("gptq", 2, {}),
    "gptq without g_idx": ("gptq", 4, {"g_idx": "absent"}),
    "gptq act-order": ("gptq", 4, {"g_idx": "shuffled"}),
    "gptq_v2 act-order": ("gptq_v2", 4, {"g_idx": "shuffled"}),
    "awq": ("awq", 4, {}),
    "packed symmetric": ("pack-quantized", 4, {"symmetric": True}),
    "packed 8 bits, a scale a row": ("pack-quantized", 8, {"symmetric": True, "group": None}),
    "packed asymmetric": ("pack-quantized", 4, {}),
    "packed asymmetric, zero points in bytes": ("pack-quantized", 4, {"zeros": "bytes"}),
    "packed act-order": ("pack-quantized", 4, {"g_idx": "shuffled"}),
    "packed with an index that was never set": ("pack-quantized", 4, {"symmetric": True, "g_idx": "unset"}),
    "bytes": ("int-quantized", 8, {"group": None}),
    "bytes in groups": ("int-quantized", 8, {}),
}


def pack(numbers, bits, order=None):
    """Whole numbers from 0 on (R, C) into int32 (R, ceil(C / n)): n in each, the first in the low bits."""
    count = 32 // bits
    order = order or range(count)
    rows, columns = numbers.shape
    packed = np.zeros((rows, -(-columns // count)), dtype=np.int64)
    for row in range(rows):
        for place in range(packed.shape[1]):
            for i, column in enumerate(order):
                if place * count + column < columns:
                    packed[row, place] |= int(numbers[row, place * count + column]) << (bits * i)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def less_one(packed, bits):
    """Every packed number less one, borrowing from its neighbour: the zero points of GPTQ's first version."""
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return torch.from_numpy(((packed.long().numpy() - ones) % 2**32).astype(np.uint32).view(np.int32))


def quantise(weight, method, bits, group=GROUP, symmetric=False, g_idx="plain", zeros="packed", seed=0):
    """Stored tensors of a weight (O, I) by the last part of their name, and the numbers they stand for, in float32."""
    random = np.random.default_rng(seed)
    outputs, inputs = weight.shape
    groups = inputs // group if group else 1
    index = np.arange(inputs) // (inputs // groups)
    if g_idx == "shuffled":
        random.shuffle(index)
    top, half = 2**bits - 1, 2 ** (bits - 1)
    scale = torch.from_numpy(random.uniform(0.01, 0.1, (outputs, groups))).half()
    zero = np.full((outputs, groups), half) if symmetric else random.integers(0, top + 1, (outputs, groups))
    spread = scale.float().numpy()[:, index]
    q = np.clip(np.round(weight.numpy() / spread) + zero[:, index], 0, top).astype(np.int64)
    meaning = torch.from_numpy(((q - zero[:, index]) * spread.astype(np.float64)).astype(np.float32))
    if method in ("gptq", "gptq_v2"):
        stored = {
            "qweight": pack(q, bits).T.contiguous(),
            "qzeros": less_one(pack(zero.T, bits), bits) if method == "gptq" else pack(zero.T, bits),
            "scales": scale.T.contiguous(),
        }
        if g_idx != "absent":
            stored["g_idx"] = torch.from_numpy(index).int()
    elif method == "awq":
        stored = {
            "qweight": pack(q.T, bits, AWQ_ORDER),
            "qzeros": pack(zero.T, bits, AWQ_ORDER),
            "scales": scale.T.contiguous(),
        }
    elif method == "pack-quantized":
        stored = {"weight_packed": pack(q, bits), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
        if not symmetric:
            packed = pack(zero.T, bits).T.contiguous()
            stored["weight_zero_point"] = packed if zeros == "packed" else torch.from_numpy(zero - half).to(torch.int8)
        if g_idx in ("shuffled", "unset"):
            stored["weight_g_idx"] = torch.from_numpy(index if g_idx == "shuffled" else index * 0 - 1).int()
    else:
        stored = {"weight": torch.from_numpy(q - half).to(torch.int8), "weight_scale": scale}
        stored["weight_zero_point"] = torch.from_numpy(zero - half).to(torch.int8)
    return stored, meaning


def settings(method, bits):
    """The `quantization_config` of a method."""
    if method in ("gptq", "gptq_v2"):
        return {"quant_method": "gptq", "bits": bits, "checkpoint_format": method}
    if method == "awq":
        return {"quant_method": "awq", "bits": bits, "version": "gemm"}
    weights = {"num_bits": bits, "type": "int"}
    return {
        "quant_method": "compressed-tensors",
        "format": method,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def pack_folder(folder, style):
    """Store the projections of a saved model as `style`; returns the numbers they stand for, by name."""
    method, bits, changes = STYLES[style]
    path, stored, meaning = folder / "model.safetensors", {}, {}
    for name, weight in load_file(path).items():
        if "proj" not in name or weight.dim() == 1:
            stored[name] = meaning[name] = weight
            continue
        parts, meaning[name] = quantise(weight, method, bits, **changes, seed=len(meaning))
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(stored, path, metadata={"format": "pt"})
    edit_config(folder, quantization_config=settings(method, bits))
    return meaning


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("style", STYLES)
def test_read_is_what_the_numbers_stand_for(tmp_path, style):
    folder = save_dense(tmp_path / "dense", num_hidden_layers=1, layer_types=None)
    meaning = pack_folder(folder, style)
    source = open_source(folder)
    assert set(source.headers) == set(meaning)
    assert source.nbytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    for key, weight in meaning.items():
        assert source.headers[key].shape == tuple(weight.shape)
        assert torch.equal(source.read(key), weight), key
        assert torch.equal(source.read(key, 5, 29), weight[5:29]), key


@pytest.mark.parametrize(
    ("name", "style"), [("llama_biases", "gptq act-order"), ("phi3", "awq"), ("phi3", "packed asymmetric")]
)
def test_convert_and_verify(tmp_path, name, style):
    folder = save_dense(tmp_path / "dense", name, initializer_range=0.02)
    meaning = pack_folder(folder, style)
    target = upcycle(folder, tmp_path / "moe", mode="split", shards=2, experts=4, top_k=2, progress=False)
    assert verify(folder, target, tokens=60, new_tokens=4, progress=False)["logits"]["max_abs_difference"] <= 1e-5
    dense, ids = dense_model(name), torch.arange(30)[None]
    dense.load_state_dict(meaning)
    with torch.no_grad():
        difference = AutoModelForCausalLM.from_pretrained(target)(ids).logits - dense(ids).logits
    assert difference.abs().max() <= 2e-5


def test_biases_that_a_packer_added_are_left_out(tmp_path):
    folder = save_dense(tmp_path / "dense")
    meaning = pack_folder(folder, "gptq")
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("scales")]:
        stored[name.replace("scales", "bias")] = torch.zeros(stored[name].shape[1])
    save_file(stored, folder / "model.safetensors")
    assert set(open_source(folder).headers) == set(meaning)
    stored["model.layers.1.mlp.up_proj.bias"][0] = 1.0
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp.up_proj.bias is no tensor of LlamaForCausalLM"):
        upcycle(folder, tmp_path / "moe", progress=False)


@pytest.mark.parametrize(
    ("style", "part", "change", "message"),
    [
        ("gptq", "qzeros", None, r"q_proj\.qweight is packed without model.layers.0.self_attn.q_proj.qzeros"),
        (
            "gptq",
            "g_idx",
            lambda t: t + 1,
            r"q_proj.weight cannot be dequantised: a g_idx of 48 numbers does not place",
        ),
        (
            "packed symmetric",
            "weight_shape",
            lambda t: t * 2,
            r"weight_shape says \[128, 96\] of weights packed for 48",
        ),
        ("awq", "scales", lambda t: torch.cat([t, t[:2]]), "48 inputs are not divisible by 5 groups"),
        ("gptq", "scales", lambda t: t * torch.inf, "q_proj.weight holds NaN or infinity"),
    ],
)
def test_damage_is_one_sentence_and_leaves_nothing(tmp_path, style, part, change, message):
    folder = save_dense(tmp_path / "dense")
    pack_folder(folder, style)
    stored, name = load_file(folder / "model.safetensors"), f"model.layers.0.self_attn.q_proj.{part}"
    stored |= {name: change(stored[name])} if change else {}
    if change is None:
        del stored[name]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        upcycle(folder, tmp_path / "moe", progress=False)
    assert not list(tmp_path.glob("*moe*"))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "quantised by gptq marlin are not read; known are fp8",
        ),
        ({"quant_method": "awq", "version": "gemv"}, "quantised by awq gemv are not read"),
        ({"quant_method": "awq", "bits": 3}, "AWQ weights of 3 bits are not read"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "tensors nvfp4-pack-quantized are not",
        ),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "must name one number of bits"),
    ],
)
def test_other_formats_are_named(tmp_path, quantization, message):
    folder = save_dense(tmp_path / "dense")
    edit_config(folder, quantization_config=quantization)
    with pytest.raises(ValueError, match=message):
        open_source(folder)
