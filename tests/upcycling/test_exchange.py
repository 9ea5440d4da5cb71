"""To Transformers' own mixtures and back: equal logits there, equal bytes here."""

import json
import shutil

import pytest
import torch
from dense import COMMON, random_ids, save_dense
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.upcycling import export, import_mixture, upcycle, verify
from hf_moe.upcycling.formats import FEATURES, FORMATS, format_of, matrix


def state(folder):
    """All tensors of a folder by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def make(tmp_path, name):
    """A folder of ours that fits the format, routers and norms included."""
    if name == "deepseek_v3":
        # A DeepSeek model rotates one key and norms its latent: nothing that a dense source has.
        tiny_model("deepseek_v3", latent_norm_eps=1e-6).save_pretrained(tmp_path / "moe")
        return tmp_path / "moe"
    dense, choices = {"mixtral": ("mistral", {}), "qwen3_moe": ("qwen3", {"dense_layers": (1,)})}[name]
    source = save_dense(tmp_path / "dense", dense, tokenizer=True)
    return upcycle(source, tmp_path / "moe", mode="drop", experts=4, progress=False, **choices)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_there_and_back(tmp_path, name):
    folder = make(tmp_path, name)
    out = export(folder, tmp_path / "theirs", name, progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(theirs).__name__ == format_of(name).architecture
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = random_ids() % ours.config.vocab_size
    assert (theirs(ids).logits - ours(ids).logits).abs().max() <= 1e-5
    assert not list(out.glob("*_hf_moe.py"))

    back = import_mixture(out, tmp_path / "back", progress=False)
    first, again = state(folder), state(back)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, ours(ids).logits)


# name → model type and options, for mixtures that were never ours.
FOREIGN = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [1]}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
    "qwen2_moe_sliding": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "norm_topk_prob": False}),
    "olmoe_biases": ("olmoe", {"num_experts": 4, "attention_bias": True}),
}


@pytest.mark.parametrize("name", FOREIGN)
@torch.no_grad()
def test_foreign_mixtures_come_in_exactly(tmp_path, name):
    model_type, options = FOREIGN[name]
    config = AutoConfig.for_model(model_type, **{**COMMON, "num_experts_per_tok": 2, **options})
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, parameter in theirs.named_parameters():
        if key.endswith("bias") or "norm" in key or "gate.weight" in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoModelForCausalLM.from_pretrained(
        import_mixture(tmp_path / "theirs", tmp_path / "ours", progress=False), dtype=torch.float32
    ).eval()
    ids = random_ids()
    assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-5
    assert ours.config.norm_topk_prob == options.get("norm_topk_prob", name == "mixtral")
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **greedy), theirs.generate(ids, **greedy))


def test_clipped_queries_are_refused(tmp_path):
    config = AutoConfig.for_model("olmoe", **COMMON, num_experts=4, num_experts_per_tok=2, clip_qkv=8.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"clip_qkv=8\.0 of a olmoe model has no equal here"):
        import_mixture(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@torch.no_grad()
def test_fine_grained_split_goes_to_mixtral(tmp_path):
    """With the scale on the down-projections a split needs nothing that Mixtral lacks."""
    source = save_dense(tmp_path / "dense")
    split = {"mode": "split", "shards": 4, "experts": 8, "top_k": 4, "split_scale": "down"}
    folder = upcycle(source, tmp_path / "moe", progress=False, **split)
    out = export(folder, tmp_path / "theirs", "mixtral", progress=False)
    ids = random_ids()
    theirs, dense = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (out, source))
    assert (theirs - dense).abs().max() <= 1e-5


def test_fields_that_servers_read(tmp_path):
    out = export(make(tmp_path, "deepseek_v3"), tmp_path / "theirs", "deepseek_v3", engine="vllm", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config["scoring_func"] == "sigmoid"
    assert config["topk_method"] == "noaux_tc"
    assert config["num_nextn_predict_layers"] == 0
    assert config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("dense", "choices", "to", "message"),
    [
        ("llama_biases", {}, "mixtral", "MixtralForCausalLM has no place for: output bias, query or key bias"),
        ("qwen3", {}, "mixtral", "no place for: norms a query and key head"),
        ("llama3", {}, "qwen3_moe", "always has, and this model has not: norms a query and key head"),
        ("llama3", {"mode": "drop"}, "deepseek_v3", "no place for: softmax router of experts that differ"),
        ("llama3", {"mode": "noise", "noise_std": 0.01}, "deepseek_v3", "softmax router of experts that differ"),
        (
            "llama3",
            {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 6, "top_k": 3},
            "deepseek_v3",
            "no place for: as many experts of each group, softmax router of experts that differ",
        ),
        ("mistral", {}, "deepseek_v3", "no place for: sliding window"),
        ("gemma3", {}, "deepseek_v3", "norms a query and key head, norms behind the branches, sliding and full"),
        ("llama3", {"dtype": "float16"}, "deepseek_v3", "float16 has no room for the constant"),
        ("gemma3", {}, "mixtral", "a rope for each layer type, embedding multiplier"),
        ("phi3_partial", {}, "mixtral", "position-free keys"),
        ("llama3", {"dense_layers": (0,)}, "mixtral", "no place for: dense layers"),
        (
            "llama3",
            {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 6, "top_k": 3},
            "mixtral",
            "no place for: as many experts of each group, shared experts",
        ),
        ("llama3", {}, "olmoe", "unknown format 'olmoe'; known are mixtral, qwen3_moe, deepseek_v3"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, dense, choices, to, message):
    folder = upcycle(save_dense(tmp_path / "dense", dense), tmp_path / "moe", progress=False, **choices)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "theirs", to, progress=False)
    assert not list(tmp_path.glob("*theirs*"))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"rms_norm_eps": 1e-5}, "norm epsilon other than 1e-6 .* it takes rms_norm_eps for the latent's norm too"),
        ({"num_key_value_heads": 2}, "frequencies that repeat .* it reads every scaled rope as yarn"),
        ({"kv_a_layernorm": False}, "grouped-query attention .* is a bias, and it leaves biases out"),
        ({"kv_bias": True}, "query or key bias .* it leaves the attention's biases out"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_a_server_would_misread_is_refused(tmp_path, engine, choices, reason):
    tiny_model("deepseek_v3", latent_norm_eps=1e-6, **choices).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=f"{engine} would misread {reason}"):
        export(tmp_path / "moe", tmp_path / "theirs", "deepseek_v3", engine=engine, progress=False)
    assert export(tmp_path / "moe", tmp_path / "theirs", "deepseek_v3", progress=False).is_dir()


def test_trained_selection_is_refused(tmp_path):
    folder = upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight.add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.kv_b_proj\.weight is no longer the selection"):
        export(tmp_path / "trained", tmp_path / "theirs", "mixtral", progress=False)


def test_fine_tuned_model_is_exported(tmp_path):
    """What `save_pretrained` writes after training goes out as well as what `upcycle` wrote."""
    folder = upcycle(save_dense(tmp_path / "dense"), tmp_path / "moe", progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.mul_(1.1)
        model.model.layers[0].mlp.gate.weight.mul_(3)
    model.save_pretrained(tmp_path / "trained")
    out = export(tmp_path / "trained", tmp_path / "theirs", "mixtral", progress=False)
    ids = random_ids()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        assert (theirs - model(ids).logits).abs().max() <= 1e-5


def test_foreign_folders(tmp_path):
    source = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="holds a 'llama' model; known are hf_moe, mixtral"):
        import_mixture(source, tmp_path / "moe", progress=False)
    with pytest.raises(ValueError, match=r"unknown engine 'llama\.cpp'"):
        export(source, tmp_path / "moe", "mixtral", engine="llama.cpp")


def test_matrix_names_every_feature():
    rows = matrix()
    assert rows[0] == ["feature", "mixtral", "qwen3_moe", "deepseek_v3"]
    assert [row[0] for row in rows[1:]] == list(FEATURES)
    assert {cell for row in rows[1:] for cell in row[1:]} == {"needed", "yes", "transformers", "-"}
    for layout in FORMATS.values():
        assert layout.needs <= layout.holds <= FEATURES.keys()
        assert all(reasons.keys() <= layout.holds for reasons in layout.misread.values())


def test_hub_id_provenance_and_card(tmp_path, monkeypatch):
    import huggingface_hub

    folder = make(tmp_path, "mixtral")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    theirs = export(folder, tmp_path / "theirs", "mixtral", progress=False)
    record = json.loads((theirs / "provenance.json").read_text())
    assert record["conversion"] == ["hf_moe", "mixtral"]
    assert {entry["name"] for entry in record["tensors"]} == state(theirs).keys()
    assert "license: mit" in (theirs / "README.md").read_text()
    with pytest.raises(ValueError, match=r"only what hf-moe upcycle wrote can be verified"):
        verify(tmp_path / "dense", theirs, progress=False)
    commit = theirs.rename(tmp_path / "0123abcd")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(commit))
    back = import_mixture("owner/name", tmp_path / "back", progress=False)
    assert json.loads((back / "provenance.json").read_text())["sources"] == [
        {"name": "owner/name", "revision": "0123abcd"}
    ]
    card = (back / "README.md").read_text()
    assert "base_model:\n- owner/name\n" in card
    assert "`owner/name` at revision `0123abcd`" in card


def test_missing_and_quantised_weights_are_refused(tmp_path):
    theirs = export(make(tmp_path, "mixtral"), tmp_path / "theirs", "mixtral", progress=False)
    config = json.loads((theirs / "config.json").read_text())
    packed = shutil.copytree(theirs, tmp_path / "packed")
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="packed is quantised by 'gptq', and import copies plain numbers only"):
        import_mixture(packed, tmp_path / "back", progress=False)
    path = next(theirs.glob("*.safetensors"))
    weights = load_file(path)
    (theirs / "model.safetensors.index.json").unlink()
    for lost in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.input_layernorm.weight"):
        save_file({name: tensor for name, tensor in weights.items() if name != lost}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{lost} is missing from the weights, though other layers have theirs"):
            import_mixture(theirs, tmp_path / "back", progress=False)
