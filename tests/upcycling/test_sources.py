"""What is read equals what Transformers reads, tensor by tensor."""

import gguf
import numpy as np
import pytest
import torch
from dense import dense_model, save_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig

from hf_moe.upcycling import open_source, upcycle
from hf_moe.upcycling.headers import read_folder

# Rows of a quantised tensor are blocks of 32 numbers.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}


def write_gguf(path, model, quantised="F32"):
    """A Llama as llama.cpp stores it, query and key rows permuted; returns the path."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_license("apache-2.0")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in state.items():
        data = weight.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType[quantised if data.ndim == 2 else "F32"]
        stored = gguf.quantize(np.ascontiguousarray(data), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quantised", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_tensors_are_those_of_transformers(tmp_path, quantised):
    path = write_gguf(tmp_path / "tiny.gguf", dense_model("llama2", **SIZES), quantised)
    source = open_source(path)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).state_dict()
    assert set(source.headers) == set(expected)
    for name, weight in expected.items():
        assert source.headers[name].shape == weight.shape
        assert torch.equal(source.read(name).float(), weight), name
        assert torch.equal(source.read(name, 3, 7).float(), weight[3:7])
    assert source.license() == "apache-2.0"


def test_gguf_is_converted(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", dense_model("llama2", **SIZES), "Q8_0")
    target = upcycle(path, tmp_path / "moe", experts=3, progress=False)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    moe = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-5
    assert "license: apache-2.0" in (target / "README.md").read_text()


@pytest.mark.parametrize("damage", ["truncated", "no GGUF", "rope factors"])
def test_bad_gguf(tmp_path, damage):
    path = write_gguf(tmp_path / "tiny.gguf", dense_model("llama2", **SIZES))
    message = "tiny.gguf is not a GGUF file that can be read"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "no GGUF":
        path.write_bytes(b"GGML" + bytes(100))
    else:
        writer = gguf.GGUFWriter(path, "llama")
        for name, field in gguf.GGUFReader(path).fields.items():
            if name.startswith("llama."):
                writer.add_key_value(name, field.contents(), field.types[0])
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
        message = "rope frequency factors"
        path = tmp_path / "factors.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(ValueError, match=message):
        open_source(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"neither a folder, a \.gguf file nor a Hub id"):
        open_source(path)


@pytest.mark.parametrize("shards", ["1GB", "60KB"])
def test_folder_tensors_and_rows(tmp_path, shards):
    folder = save_dense(tmp_path / "dense", max_shard_size=shards, dtype=torch.bfloat16)
    source = open_source(folder)
    expected = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(source.headers) == set(expected) == set(read_folder(folder))
    for name, weight in expected.items():
        assert torch.equal(source.read(name), weight)
        assert torch.equal(source.read(name, 1, 5), weight[1:5])


@pytest.mark.parametrize("other", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_the_file_that_transformers_loads_is_the_model(tmp_path, other):
    folder = save_dense(tmp_path / "dense")
    expected = load_file(folder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in expected.items()}, folder / other)
    source = open_source(folder)
    assert source.headers.keys() == expected.keys()
    assert all(torch.equal(source.read(name), weight) for name, weight in expected.items())
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(source.read(name), loaded[name]) for name in expected)


def test_licence_of_a_folder(tmp_path):
    folder = save_dense(tmp_path / "dense")
    assert open_source(folder).license() is None
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Card\n")
    assert open_source(folder).license() == "mit"
