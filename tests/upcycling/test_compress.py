"""`--attention compress` on whole models: exact at full size, a price that falls as caches grow, caches, resumption."""

import json
import shutil
from itertools import pairwise
from math import prod

import pytest
import torch
from dense import random_ids, save_dense
from safetensors.torch import load_file, save_file
from test_exactness import decode, load_pair
from transformers import StaticCache

from hf_moe.cost import cache_numbers, cache_widths
from hf_moe.upcycling import Options, make_plan, open_source, upcycle, verify
from hf_moe.upcycling import learnt_attention as learnt_module
from hf_moe.upcycling.convert import partial_folder
from hf_moe.upcycling.demand import demand, disk_bytes
from hf_moe.upcycling.summary import summarise

# The tests' models have no tokenizer, so the text is random tokens.
TEXT = {"attention": "compress", "experts": 1, "calibration_tokens": 1024, "progress": False}
NAMES = ["llama3", "qwen2", "qwen3", "mistral", "gemma2"]
# Sizes at which the cache is the source's: all pairs rotary (keys of qwen3 stay as they are) and all of the values.
FULL = {"llama3": (32, 32), "qwen2": (24, 24), "qwen3": (16, 32), "mistral": (24, 24), "gemma2": (32, 32)}


def ledger_of(folder):
    return json.loads((folder / "ledger.json").read_text())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_full_size_is_the_source(tmp_path, name):
    source = save_dense(tmp_path / "dense", name)
    rope_dim, kv_rank = FULL[name]
    target = upcycle(source, tmp_path / "moe", kv_rank=kv_rank, rope_dim=rope_dim, **TEXT)
    dense, moe = load_pair(source, target)
    assert cache_numbers(moe.config.to_dict()) == ledger_of(target)["cache_numbers_source"]
    ids = random_ids()
    assert (moe(ids).logits - dense(ids).logits).abs().max() <= 2e-5
    tokens, _ = decode(moe, ids, 6)
    assert torch.equal(tokens, decode(dense, ids, 6)[0])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_price_falls_as_the_cache_grows(tmp_path, name):
    source, prices = save_dense(tmp_path / "dense", name), []
    ratios = (0.7, 0.9) if name == "qwen3" else (0.5, 0.75)
    ids = random_ids()
    for ratio in ratios:
        target = upcycle(source, tmp_path / f"{ratio}", cache_ratio=ratio, **TEXT)
        dense, moe = load_pair(source, target)
        ledger = ledger_of(target)
        assert ledger["cache_numbers"] <= ratio * ledger["cache_numbers_source"]
        assert ledger["cache_numbers"] == cache_numbers(moe.config.to_dict())
        p, q = (model(ids).logits.log_softmax(-1) for model in (dense, moe))
        prices.append((p.exp() * (p - q)).sum(-1).mean())
        assert 0 < ledger["model"]["kl"] < 2
    assert prices[1] < prices[0] / 2

    # The last one: every cache and both forms of attention give the same tokens.
    tokens, cached = decode(moe, ids, 8)
    uncached = moe(torch.cat([ids, tokens[:, :-1]], dim=1), use_cache=False).logits[:, -8:]
    assert (cached - uncached).abs().max() <= 2e-5
    static = StaticCache(config=moe.config, max_cache_len=64)
    both = [moe.generate(ids, past_key_values=c, max_new_tokens=8, do_sample=False) for c in (None, static)]
    assert torch.equal(*both)
    layer = moe.model.layers[1].self_attn
    x, rope = torch.randn(1, 9, 48), moe.model.rotary_emb(ids[:1, :9].float(), torch.arange(9)[None])
    rope = moe.model.rotary_emb.of_layers(
        {t: moe.model.rotary_emb(x, torch.arange(9)[None], t) for t in moe.model.rotary_emb.layer_types}
    )[1]
    expanded = layer(x, rope, None)[0]
    layer.absorption_pays = lambda *_: True
    assert (layer(x, rope, None)[0] - expanded).abs().max() <= 1e-5 * expanded.abs().max()


def test_with_experts_it_resumes_and_verifies(tmp_path, monkeypatch):
    """One pass makes experts and attention; what was learnt is not learnt again; bytes are those of one run."""
    source = save_dense(tmp_path / "dense", "qwen2", tokenizer=True)
    choices = TEXT | {"mode": "split", "shards": 2, "experts": 4, "top_k": 2, "cache_ratio": 0.6, "query_rank": 40}
    whole = upcycle(source, tmp_path / "whole", **choices)
    certificate = verify(source, whole, tokens=64, new_tokens=4, progress=False)
    assert certificate["passed"]
    assert 0 < certificate["logits"]["kl"] < 2
    assert certificate["logits"]["max_abs_difference"] > 1e-3
    card = (whole / "README.md").read_text()
    assert "Price of the smaller cache" in card
    assert "--attention compress --cache-ratio 0.6 --query-rank 40" in card

    from hf_moe.upcycling import convert as convert_module

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            upcycle(source, tmp_path / "again", **choices)
    assert (partial_folder(tmp_path / "again") / "ledger.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(learnt_module, "survey", None)
        again = upcycle(source, tmp_path / "again", **choices)
    for name in ("ledger.json", "config.json", "calibration-attention.safetensors", "model-00001-of-00001.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()

    ledger = ledger_of(whole)
    ledger["layers"][0]["latent"] += 1
    (whole / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(ValueError, match=r"ledger.json has changed"):
        verify(source, whole, tokens=64, new_tokens=4, progress=False)


# Ranks at which a bottleneck of the queries loses nothing: of the hidden size 48, 48 query numbers or more.
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma2"])
@torch.no_grad()
def test_queries_through_a_bottleneck(tmp_path, name):
    """Nothing is lost at full rank, biases and norms of the heads included; a lower one has its price."""
    source, ids, prices = save_dense(tmp_path / "dense", name), random_ids(), []
    rope_dim, kv_rank = FULL[name]
    for rank in (48, 24):
        choices = TEXT | {"calibration_tokens": 512, "kv_rank": kv_rank, "rope_dim": rope_dim, "query_rank": rank}
        target = upcycle(source, tmp_path / f"{rank}", **choices)
        dense, moe = load_pair(source, target)
        assert (moe.config.q_lora_rank, moe.config.q_a_layernorm) == (rank, False)
        prices.append(ledger_of(target)["model"]["kl"])
        if rank == 48:
            assert (moe(ids).logits - dense(ids).logits).abs().max() <= 2e-5
            assert all(row["measured_queries"] < 1e-12 for row in ledger_of(target)["layers"])
    assert all(0 < row["measured_queries"] < 0.5 for row in ledger_of(target)["layers"])
    assert all(row["predicted_query_tail"] > 0 for row in ledger_of(target)["layers"])
    assert abs(prices[0]) < 1e-6 < prices[1] < 2

    tokens, cached = decode(moe, ids, 6)
    uncached = moe(torch.cat([ids, tokens[:, :-1]], dim=1), use_cache=False).logits[:, -6:]
    assert (cached - uncached).abs().max() <= 2e-5


def test_a_price_that_the_queries_alone_exceed_is_refused(tmp_path):
    source = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"query_rank=4 alone costs a KL of 0.\d+, above max_kl=0.001"):
        upcycle(source, tmp_path / "moe", max_kl=1e-3, query_rank=4, **TEXT | {"calibration_tokens": 128})


def test_uniform_sizes_and_a_limit_on_the_price(tmp_path):
    source = save_dense(tmp_path / "dense")
    target = upcycle(source, tmp_path / "uniform", cache_ratio=0.5, uniform=True, **TEXT)
    config = json.loads((target / "config.json").read_text())
    assert config["kv_lora_ranks"] is None
    assert len(set(cache_widths(config))) == 1
    assert ledger_of(target)["model"]["kl"] > 1e-3
    curve = ledger_of(target)["curve"]
    assert all(a["cache_numbers"] < b["cache_numbers"] for a, b in pairwise(curve))
    assert all(a["predicted_kl"] > b["predicted_kl"] for a, b in pairwise(curve))
    half = next(p["predicted_kl"] for p in curve if p["cache_numbers"] == ledger_of(target)["cache_numbers"])
    assert half == pytest.approx(sum(row["predicted_kl"] for row in ledger_of(target)["layers"]))
    assert (target / "ledger.png").read_bytes().startswith(b"\x89PNG")
    assert "(ledger.png)" in (target / "README.md").read_text()
    within = ledger_of(upcycle(source, tmp_path / "within", max_kl=1e-3, **TEXT))
    assert within["model"]["kl"] <= 1e-3
    assert within["cache_numbers"] < within["cache_numbers_source"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_source_is_named_and_leaves_nothing(tmp_path, value):
    source = save_dense(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        upcycle(source, tmp_path / "moe", cache_ratio=0.5, **TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_plan_shows_the_smaller_cache(tmp_path):
    source = open_source(save_dense(tmp_path / "dense"))
    half = summarise(make_plan(source, Options(attention="compress", cache_ratio=0.5)), source)
    assert half["target"]["cache_bytes_per_token"] * 2 == half["source"]["cache_bytes_per_token"]
    ranks = Options(attention="compress", kv_rank=20, rope_dim=8)
    assert summarise(make_plan(source, ranks), source)["target"]["cache_bytes_per_token"] == 3 * 28 * 4


def test_plan_shows_what_a_bottleneck_saves(tmp_path):
    """Of 48 inputs and 4 · (16 + 8) query numbers of each of three layers."""
    source = open_source(save_dense(tmp_path / "dense"))
    full, narrow = (
        make_plan(source, Options(attention="compress", kv_rank=20, rope_dim=8, query_rank=rank)) for rank in (None, 24)
    )
    saved = 3 * (48 * 96 - 24 * (48 + 96))
    assert sum(prod(t.shape) for t in full.tensors()) - sum(prod(t.shape) for t in narrow.tensors()) == saved
    shown = [summarise(plan, source)["target"] for plan in (full, narrow)]
    assert shown[0]["parameters"] - shown[1]["parameters"] == saved


@pytest.mark.parametrize(
    "choices", [{"cache_ratio": 0.6, "query_rank": 24}, {"cache_ratio": 0.6, "mode": "cluster", "experts": 4}]
)
def test_plan_counts_what_is_learnt(tmp_path, monkeypatch, choices):
    source = open_source(save_dense(tmp_path / "dense", "qwen2"))
    options = {**TEXT, **choices}
    del options["progress"]
    plan = make_plan(source, Options(**options))
    found, run = demand(plan, source), summarise(plan, source)["conversion"]
    assert run["calibration"]["tokens"] == found.tokens >= 1024
    assert run["memory_peak_bytes"] > found.memory > 0
    assert run["disk_bytes"] == disk_bytes(plan, source) >= plan.nbytes + found.kept
    twice = demand(make_plan(source, Options(**options | {"calibration_tokens": 2048})), source)
    assert found.flops < twice.flops < 2.1 * found.flops
    # Of the text only states stay in memory: a few numbers for each token, and of experts those of the neurons.
    assert (twice.memory - found.memory) / 1024 < 4 * (4 * 48 + 100 + 6 * 96)

    usage, free = shutil.disk_usage(tmp_path), plan.nbytes + 64 * 1024 * 1024
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        with pytest.raises(
            OSError, match=f"{disk_bytes(plan, source) + 64 * 1024 * 1024:,} bytes needed, {free:,} free"
        ):
            upcycle(source.path, tmp_path / "moe", **TEXT | choices)
    target = upcycle(source.path, tmp_path / "moe", **TEXT | choices)
    stored = [tensor for path in target.glob("calibration*.safetensors") for tensor in load_file(path).values()]
    # The plan's layers are alike; the budget's are not, and may leave a number unspent.
    assert sum(tensor.nbytes for tensor in stored) == pytest.approx(found.kept, rel=0.1)


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("llama3", {}, "exactly one of cache_ratio, kv_rank with rope_dim, and max_kl; got none"),
        ("llama3", {"cache_ratio": 0.5, "max_kl": 0.1}, "got cache_ratio and max_kl"),
        ("llama3", {"kv_rank": 8}, "kv_rank=8 and rope_dim=None: give both or neither"),
        ("llama3", {"cache_ratio": 1.5}, "cache_ratio=1.5 must be a number above 0, at most 1"),
        ("llama3", {"kv_rank": 8, "rope_dim": 7}, "rope_dim=7 must be even"),
        ("llama3", {"cache_ratio": 0.5, "attention": "exact"}, "cache_ratio belongs to attention='compress'"),
        ("llama3", {"cache_ratio": 0.04}, "leaves 3 of 64 .* the least that can be built is 3, cache_ratio=0.0469"),
        ("llama3", {"kv_rank": 61, "rope_dim": 4}, "kv_rank=61 is above 60, all that keys and values .* rope_dim=4"),
        ("llama3", {"kv_rank": 8, "rope_dim": 40}, "rope_dim=40 is above the 32 that the source's keys have"),
        ("llama3", {"cache_ratio": 0.5, "query_rank": 0}, "query_rank=0 must be a whole number of at least 1"),
        ("llama3", {"cache_ratio": 0.5, "query_rank": 49}, "query_rank=49 is above 48, .*lose nothing"),
        ("qwen2", {"cache_ratio": 0.5, "query_rank": 49}, "query_rank=49 is above 48, .*lose nothing"),
        ("llama3", {"query_rank": 8, "attention": "exact"}, "query_rank belongs to attention='compress', not"),
        ("qwen3", {"cache_ratio": 0.5}, "cache_ratio=0.5157: the keys of qwen3 have norms of their own"),
        ("qwen3", {"kv_rank": 8, "rope_dim": 8}, "keys of qwen3 have norms of their own and cannot be compressed"),
        ("phi3_partial", {"cache_ratio": 0.5}, "keys that rotate whole: phi3 rotates 6 of 12"),
        (
            "llama3",
            {"cache_ratio": 0.5, "calibration": ("TEXT",)},
            "the calibration text has 12 tokens, 1280 are needed",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused_with_its_numbers(tmp_path, name, choices, message):
    source = save_dense(tmp_path / "dense", name, tokenizer="calibration" in choices)
    if "calibration" in choices:
        (tmp_path / "short").write_text("twelve bytes")
        choices = choices | {"calibration": (str(tmp_path / "short"),)}
    with pytest.raises(ValueError, match=message):
        upcycle(source, tmp_path / "moe", **TEXT | choices)
    assert [path.name for path in tmp_path.iterdir() if path.name != "short"] == ["dense"]
