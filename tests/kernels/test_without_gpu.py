"""What holds without a GPU and without the interpreter: the fallback, inert imports, the tables."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.kernels import experts, tuning


def small_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        )
    )


def test_importing_the_kernels_imports_no_triton():
    code = "import sys, hf_moe.kernels.experts as e; e.register(); print('triton' in sys.modules, e.NAME)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [sys.executable, "-c", "import sys, transformers.integrations.moe; print('triton' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[0] == before.stdout.split()[0]


def test_registration_changes_no_other_entry():
    before = dict(ALL_EXPERTS_FUNCTIONS.items())
    experts.register()
    after = dict(ALL_EXPERTS_FUNCTIONS.items())
    assert after.pop(experts.NAME) is experts.experts_forward
    assert {name: f for name, f in before.items() if name != experts.NAME} == after


def test_the_cpu_falls_back_to_grouped_mm_with_the_same_numbers(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = []
    monkeypatch.setattr(experts.logger, "info", reasons.append)
    model = small_mixtral()
    ids = torch.arange(12).view(2, 6)
    model.set_experts_implementation("grouped_mm")
    theirs = model(ids).logits
    ours = experts.accelerate(model)(ids).logits
    assert torch.equal(ours, theirs)
    assert "grouped_mm, because its tensors are on 'cpu'" in reasons[0]


def test_a_model_in_double_precision_runs():
    model, ids = small_mixtral(), torch.arange(12).view(2, 6)
    single = model(ids).logits
    model = experts.accelerate(model.double())
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    model.set_experts_implementation(experts.NAME)
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(expected.float(), single, rtol=1e-4, atol=1e-5)


def test_the_fallback_compiles_in_one_graph():
    model = experts.accelerate(small_mixtral())
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, expected)


def test_a_norm_after_each_expert_falls_back(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = next(m for m in small_mixtral().modules() if hasattr(m, "has_post_expert_norm"))
    module.has_post_expert_norm = True
    assert "has_post_expert_norm" in experts.reason_to_fall_back(module, torch.zeros(1, 32))
    module.has_post_expert_norm = False
    assert experts.reason_to_fall_back(module, torch.zeros(1, 32)) is None


def test_every_gate_in_the_table_is_a_gate_of_transformers():
    import importlib

    for where in experts._GATES:
        module, _, name = where.rpartition(".")
        method = getattr(importlib.import_module(f"transformers.models.{module}"), name)._apply_gate
        assert f"{method.__module__}.{method.__qualname__}" == f"transformers.models.{where}._apply_gate"


def test_tiles_share_their_height_and_fit():
    walkers = [op for op in tuning.HOPPER if op not in ("up_gradient", "down_gradient")]
    buckets = sorted({least for op in walkers for least in tuning.HOPPER[op]})
    for rows in buckets:
        assert len({tuning._at(tuning.HOPPER[op], rows).m for op in walkers}) == 1
    for table in tuning.HOPPER.values():
        assert min(table) == 0
        for tile in table.values():
            staged = tile.m * tile.n if tile.tma_store else 0
            assert 2 * tile.stages * tile.k * (tile.m + tile.n) + staged < 227 * 1024
    few = tuning._SMALL_BATCH
    assert 2 * few.stages * few.k * (few.m + few.n) < 227 * 1024
    for tile in tuning._ANY.values():
        assert 2 * tile.stages * tile.k * (tile.m + tile.n) < 99 * 1024


def test_tuned_tiles_are_read_from_the_users_table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    (tmp_path / "tiles.json").write_text(json.dumps({"A GPU": {"down": {"64": [64, 128, 64, 4, 3]}}}))
    device = torch.device("cuda", 7)
    tuning._machine_tables.cache_clear()
    tuning.choose.cache_clear()
    assert tuning.choose("down", device, torch.bfloat16, 70) == tuning.Tile(64, 128, 64, 4, 3)
    assert tuning.choose("down", device, torch.bfloat16, 500) == tuning.HOPPER["down"][96]
    assert tuning.choose("down", device, torch.float32, 500).m == 64
    tuning._machine_tables.cache_clear()
    tuning.choose.cache_clear()


def test_tuning_keeps_the_fastest_tile_and_saves_it(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"Another GPU": {"down": {"1": [16, 64, 64, 4, 3]}}}))
    monkeypatch.setenv("HF_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tuning, "_step", lambda *args: None)
    monkeypatch.setattr(tuning, "_time", lambda step, tables, op, rows, tile: tile.n + tile.stages + 10 * tile.per_sm)
    lines = []
    tuning._machine_tables.cache_clear()
    assert tuning.tune([(2048, 768, 128, 8)], [8192], report=lines.append) == path
    saved = json.loads(path.read_text())
    assert saved["Another GPU"] == {"down": {"1": [16, 64, 64, 4, 3]}}
    assert len(lines) == len(tuning.HOPPER)
    chosen = tuning.choose("down", torch.device("cuda", 0), torch.bfloat16, 512)
    assert list(chosen) == saved["A GPU"]["down"]["512"]
    assert (chosen.m, chosen.n, chosen.stages, chosen.per_sm) == (128, 128, 3, 0)
    tuning._machine_tables.cache_clear()
    tuning.choose.cache_clear()


def test_tuning_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="needs a GPU"):
        tuning.tune([(64, 64, 4, 2)])


def test_what_stays_unsorted_is_few_tokens_with_few_routes_an_expert():
    assert tuning.is_small_batch(64, 64 * 8, 64)
    assert tuning.is_small_batch(128, 128 * 8, 128)
    assert not tuning.is_small_batch(129, 129 * 8, 256)
    assert not tuning.is_small_batch(64, 64 * 2, 8)


def test_amd_is_not_taken_for_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    generation = tuning.nvidia_generation.__wrapped__
    assert generation(torch.device("cuda")) == 9
    assert generation(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert generation(torch.device("cuda")) == 0
