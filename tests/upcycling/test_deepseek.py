"""Any attention of ours as stock DeepseekV3: the identities in float64, the logits, and the way back."""

import json
import re

import pytest
import torch
from dense import random_ids, save_dense
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe import HfMoeConfig
from hf_moe.cli import app
from hf_moe.model.attention_hf_moe import HfMoeRMSNorm
from hf_moe.model.rotary_hf_moe import HfMoeRotaryEmbedding, apply_rotary_pos_emb
from hf_moe.upcycling import deepseek, export, import_mixture, upcycle
from hf_moe.upcycling.deepseek import Shape, inverse_of, norm_constants, pad_norm, stock_latent, stock_query


def norm(x, weight, eps=0.0):
    """RMS norm in x's precision."""
    module = HfMoeRMSNorm(x.shape[-1], eps).to(x.dtype)
    module.weight.data.copy_(weight)
    return module(x).detach()


def test_padding_a_normed_latent_changes_nothing():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7).double(), torch.randn(7).double()
    wide = norm(torch.nn.functional.pad(x, (0, 4)), pad_norm(weight, size=11))
    assert (wide[:, :7] - norm(x, weight)).abs().max() <= 1e-14
    assert wide[:, 7:].abs().max() == 0
    assert torch.equal(deepseek.own_norm(pad_norm(weight, size=7), size=7), weight)


def test_linearised_norm_errs_by_the_inverse_square():
    torch.manual_seed(0)
    x, errors = torch.randn(5, 7).double(), []
    for constant in (1e2, 1e3, 1e4):
        wide = torch.cat([x, torch.full((5, 1), constant, dtype=torch.float64)], dim=-1)
        scale = torch.full((8,), constant / 8**0.5, dtype=torch.float64)
        errors.append((norm(wide, scale)[:, :7] - x).abs().max().item())
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([100, 100], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 33, 192, 1024])
def test_constants_make_the_norm_a_power_of_two(dtype, width):
    constants = torch.tensor(norm_constants(width, dtype), dtype=torch.float64)
    assert torch.equal(constants, constants.to(dtype).double())
    root = (constants.square().sum() / (width + len(constants))).sqrt() / deepseek.NORM_SCALE
    assert abs(root - 1) <= 2e-7
    assert len(constants) == (1 if dtype == torch.float32 else 3) or width == 1


def test_one_key_of_repeated_frequencies_scores_as_several():
    """q · k of the shared key, rotated by the repeated table, is q_h · k_g(h), for layers that use some pairs only."""
    config = HfMoeConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, qk_nope_head_dim=3, kv_a_layernorm=False,
        kv_lora_rank=5, kv_lora_ranks=[5, 2], qk_rope_head_dim=6, rope_table_dim=8, rope_frequencies=[[0, 2, 2], [1]],
    )  # fmt: skip
    shape, length, generator = Shape.of(config), 6, torch.Generator().manual_seed(0)
    assert shape.union == (0, 1, 2, 2)
    table = HfMoeRotaryEmbedding(config).inv_freq.double()
    for layer, own in enumerate(config.rope_frequencies):
        pairs, rank = len(own), config.latent_widths[layer]
        angles = torch.arange(length).double()[:, None] * table
        ours = [f(torch.cat([angles[:, own]] * 2, dim=-1))[None] for f in (torch.cos, torch.sin)]
        theirs = [f(torch.cat([angles[:, list(shape.union) * 2]] * 2, dim=-1))[None] for f in (torch.cos, torch.sin)]
        query = torch.randn(4 * (3 + 2 * pairs), length, generator=generator).double()
        key = torch.randn(rank + 2 * 2 * pairs, length, generator=generator).double()
        places = {"groups": 2, "pairs": list(shape.pairs[layer]), "union": 4, "interleave": False}
        wide = stock_query(query, heads=4, nope=3, free_scale=1.0, scale=1.0, columns=length, **places)
        shared = stock_latent(key, size=7 + 16, rank=rank, latent=7, **places)
        q = query.unflatten(0, (4, -1))[:, 3:].transpose(1, 2)[None]
        k = key[rank:].unflatten(0, (2, -1)).transpose(1, 2)[None].repeat_interleave(2, dim=1)
        scores = apply_rotary_pos_emb(q, *ours, False) @ apply_rotary_pos_emb(k, *ours, False).transpose(2, 3)
        q = wide.unflatten(0, (4, -1))[:, 3:].transpose(1, 2)[None]
        rotated = apply_rotary_pos_emb(shared[7:].T[None, None], *theirs, True)
        assert (apply_rotary_pos_emb(q, *theirs, True) @ rotated.transpose(2, 3) - scores).abs().max() <= 1e-12


def test_frequencies_come_back_to_the_bit():
    for theta, width in ((1e4, 64), (5e5, 128), (1e6, 96)):
        frequency = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float) / width)
        assert torch.equal(1.0 / (inverse_of(frequency) * 1.0), frequency)


def state(folder):
    """All tensors of a folder by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


SPLIT = {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 6, "top_k": 3, "split_scale": "factor"}
# dense source, choices; or a tiny model of ours and what differs.
DENSE = {
    "llama3": ("llama3", {"experts": 1}),
    "tied, copies": ("llama_tied", {"experts": 4}),
    "copies behind a dense layer": ("llama3", {"experts": 3, "dense_layers": (0,)}),
    "biases": ("llama_biases", {"experts": 1}),
    "query biases, copies": ("qwen2", {"experts": 2}),
    "partial rotary": ("phi3_partial", {"experts": 1}),
    "longrope": ("phi3_longrope", {"experts": 1}),
}
OURS = {
    "deepseek_v3": ("deepseek_v3", {}),
    "halves": ("deepseek_v3", {"rope_interleave": False}),
    "several keys beside a norm": ("deepseek_v3", {"num_key_value_heads": 2}),
    "no norms": ("deepseek_v3", {"q_a_layernorm": False, "kv_a_layernorm": False, "softmax_scale": 0.3}),
    "widths by layer": ("widths", {"first_k_dense_replace": 3}),
    "yarn": ("deepseek_v2", {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": False}),
}


@pytest.mark.parametrize("case", [*DENSE, *OURS])
@torch.no_grad()
def test_there_and_back(tmp_path, case):
    if case in DENSE:
        name, choices = DENSE[case]
        folder = upcycle(save_dense(tmp_path / "dense", name), tmp_path / "moe", progress=False, **choices)
    else:
        name, changes = OURS[case]
        folder = tmp_path / "moe"
        tiny_model(name, latent_norm_eps=1e-6, **changes).save_pretrained(folder)
    out = export(folder, tmp_path / "theirs", "deepseek_v3", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    # Longer than the 64 positions at which longrope changes its table.
    ids = random_ids(80) % ours.config.vocab_size
    tolerance = 2e-5 if "biases" in case else 1e-5
    assert (theirs(ids).logits - ours(ids).logits).abs().max() <= tolerance
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 12)}
    assert torch.equal(theirs.generate(ids[:, :12], **greedy), ours.generate(ids[:, :12], **greedy))

    back = import_mixture(out, tmp_path / "back", progress=False)
    first, again = state(folder), state(back)
    assert first.keys() == again.keys()
    # A scale that is no power of two is multiplied into position-free queries, and divided out again.
    scaled = ours.config.qk_nope_head_dim > 0
    for key in first:
        difference = (first[key] - again[key]).abs().max()
        assert difference <= (1e-7 if scaled and ".q_" in key else 0), key
    configs = [json.loads((each / "config.json").read_text()) for each in (folder, back)]
    assert configs[0] == configs[1]


@torch.no_grad()
def test_bfloat16_is_carried_by_smaller_constants(tmp_path):
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    folder = upcycle(source, tmp_path / "moe", experts=1, progress=False)
    out = export(folder, tmp_path / "theirs", "deepseek_v3", progress=False)
    assert {tensor.dtype for tensor in state(out).values()} == {torch.bfloat16}
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, folder))
    ids = random_ids()
    assert (theirs(ids).logits - ours(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("query_rank", [None, 24])
def test_compressed_bfloat16_comes_back_to_the_bit(tmp_path, query_rank):
    """Its position-free queries are scaled on the way out, which bfloat16 cannot hold."""
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    choices = {"attention": "compress", "cache_ratio": 0.5, "calibration_tokens": 512, "experts": 1}
    folder = upcycle(source, tmp_path / "moe", progress=False, **choices, query_rank=query_rank)
    out = export(folder, tmp_path / "theirs", "deepseek_v3", progress=False)
    assert {tensor.dtype for key, tensor in state(out).items() if "q_proj" in key or "q_b_proj" in key} == {
        torch.float32
    }
    first, again = state(folder), state(import_mixture(out, tmp_path / "back", progress=False))
    # Beside the weights stands what was learnt, in float32.
    assert again.keys() == {key for key in first if not key.startswith("layers.")}
    for key in again:
        assert first[key].dtype == again[key].dtype, key
        assert torch.equal(first[key], again[key]), key


@torch.no_grad()
def test_queries_through_a_bottleneck_keep_their_logits(tmp_path):
    """Ours has no norm there, and may have a bias: a constant undoes the stock one's."""
    source = save_dense(tmp_path / "dense", "qwen2")
    choices = {"attention": "compress", "cache_ratio": 0.5, "calibration_tokens": 512, "experts": 1, "query_rank": 24}
    folder = upcycle(source, tmp_path / "moe", progress=False, **choices)
    out = export(folder, tmp_path / "theirs", "deepseek_v3", progress=False)
    back = import_mixture(out, tmp_path / "back", progress=False)
    theirs, ours, again = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, folder, back)
    )
    assert theirs.config.model_type == "deepseek_v3"
    ids = random_ids()
    assert (theirs(ids).logits - ours(ids).logits).abs().max() <= 1e-5
    assert (again(ids).logits - ours(ids).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_trained_stock_model_comes_back_as_it_is(tmp_path):
    """Where zeros were trained away the exported form is gone; the import is then any DeepSeek-V3's."""
    folder = upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", experts=1, progress=False)
    out = export(folder, tmp_path / "theirs", "deepseek_v3", progress=False)
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight"].add_(0.01)
    save_file(tensors, file, metadata={"format": "pt"})
    back = import_mixture(out, tmp_path / "back", progress=False)
    theirs, again = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, back))
    assert again.config.num_key_value_heads == 1
    ids = random_ids()
    assert (theirs(ids).logits - again(ids).logits).abs().max() <= 1e-5


def test_export_command_measures(tmp_path):
    folder = upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", experts=1, progress=False)
    words = ["export", str(folder), str(tmp_path / "theirs"), "--to", "deepseek_v3", "-q"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = re.search(r"max \|Δlogit\| (\S+), .*top-1 agreement 100.00%, 16 greedy tokens the same", result.stdout)
    assert found
    assert 0 < float(found[1]) <= 1e-5
    result = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "vllm, sglang: query or key bias in deepseek_v3: it leaves the attention" in result.stdout


@torch.no_grad()
def test_calibrated_norm_needs_no_bias(tmp_path):
    """One rotary key and its own frequencies, latents without norm: what servers read right, at a measured error."""
    changes = {"kv_a_layernorm": False, "rms_norm_eps": 1e-5, "latent_norm_eps": 1e-6, "kv_lora_rank": 64}
    ours = tiny_model("deepseek_v3", **changes)
    ours.save_pretrained(tmp_path / "moe")
    out = export(tmp_path / "moe", tmp_path / "out", "deepseek_v3", engine="vllm", latent_norm="calibrated")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not theirs.config.attention_bias
    assert theirs.config.rope_parameters["rope_type"] == "default"
    assert not hasattr(theirs.config, "hf_moe")
    ids = random_ids() % 99
    plain = tiny_model("deepseek_v3", **{**changes, "kv_a_layernorm": True})
    exact = ours(ids).logits
    error = (theirs(ids).logits - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.5 * (plain(ids).logits - exact).norm() / exact.norm()
    back = import_mixture(out, tmp_path / "back", progress=False)
    again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert (again(ids).logits - theirs(ids).logits).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="unknown latent_norm 'none'; known are constant, calibrated"):
        export(tmp_path / "moe", tmp_path / "no", "deepseek_v3", latent_norm="none")
