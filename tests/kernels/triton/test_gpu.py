"""What only a GPU can show: the tiles of real layers, streams, graphs and the compiler."""

import pytest
import torch
import triton
from cases import HALF, Shape, index, normal, poison
from test_layer import GPT_OSS, check, inputs, run
from test_small_batch import check as check_few
from tiny import random_ids, tiny_model
from transformers import StaticCache

from hf_moe.kernels.gating import Gating
from hf_moe.kernels.layer import experts
from hf_moe.model import generation_hf_moe, kept_hf_moe

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: these tests are about its own tiles and graphs"
    ),
    # PyTorch's own remarks: that the debug mode is a prototype, that Inductor would like tf32, and on its imports.
    pytest.mark.filterwarnings(
        "ignore:Synchronization debug:UserWarning",
        "ignore:TensorFloat32:UserWarning",
        "ignore:.torch.jit:DeprecationWarning",
    ),
]

# Rows an expert: 12, 64, 500 and 2,000, so that every bucket of the tile tables is walked, with many tiles a program.
SIZES = {
    "12 rows an expert": Shape(96, 256, 128, 16, 2),
    "64 rows": Shape(512, 512, 256, 16, 2),
    "500 rows": Shape(4000, 512, 768, 16, 2),
    "2000 rows, ragged widths": Shape(8000, 264, 520, 8, 2),
    "500 rows, one expert": Shape(1000, 512, 768, 2, 1, "one"),
    "500 rows, sentinels": Shape(4000, 512, 768, 16, 2, "sentinels"),
}


# Few enough to stay unsorted, on the tiles of both paths.
FEW = {
    "one token": Shape(1, 2048, 768, 32, 8),
    "two tokens, 6 experts each": Shape(2, 1024, 1408, 32, 6),
    "more experts than routes": Shape(4, 512, 256, 64, 8),
    "64 tokens": Shape(64, 512, 256, 64, 8),
    "128 tokens, ragged widths, sentinels": Shape(128, 264, 520, 64, 3, "sentinels"),
}


@pytest.mark.parametrize("shape", FEW.values(), ids=FEW)
@pytest.mark.parametrize("gating", [Gating(), GPT_OSS, Gating("relu2", gated=False)])
@pytest.mark.parametrize("swapped", [False, True])
def test_few_tokens(shape, gating, swapped):
    check_few(shape, HALF, gating, biased=True, swapped=swapped)


@pytest.mark.parametrize("shape", FEW.values(), ids=FEW)
def test_few_tokens_in_a_graph_follow_their_routes(shape):
    tensors, static, other = inputs(shape, HALF), index(shape), index(shape, seed=1)
    rest = [tensors[name] for name in ("weight", "up", "down")]
    wanted = experts(tensors["x"], other, *rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(tensors["x"], static, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(tensors["x"], static, *rest)
    static.copy_(other)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, wanted)


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("swapped", [False, True])
def test_tiles_of_real_layers(shape, swapped):
    check(shape, HALF, swapped=swapped)


@pytest.mark.parametrize("gating", [GPT_OSS, Gating("relu2", gated=False), Gating("gelu_tanh")])
def test_gates_on_real_tiles(gating):
    check(SIZES["500 rows"], HALF, gating, biased=True, recompute=True)


def test_no_synchronisation_and_cuda_graph():
    shape = SIZES["500 rows"]
    tensors, index_TK = inputs(shape, HALF), index(shape)
    dout = normal(shape.T, shape.D, dtype=HALF, seed=7)
    eager = run(experts, tensors, index_TK, dout)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}

    def step():
        out = experts(leaves["x"], index_TK, leaves["weight"], leaves["up"], leaves["down"])
        return out, *torch.autograd.grad(out, list(leaves.values()), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = normal(shape.T, shape.D, dtype=HALF, seed=11)
    with torch.no_grad():
        leaves["x"].copy_(other)
    graph.replay()
    leaves["x"].data.copy_(tensors["x"])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(c, e) for c, e in zip(captured, eager.values(), strict=True))


def test_torch_compile():
    shape = SIZES["500 rows"]
    tensors, index_TK = inputs(shape, HALF), index(shape)
    dout = normal(shape.T, shape.D, dtype=HALF, seed=7)
    eager = run(experts, tensors, index_TK, dout)
    compiled = run(torch.compile(experts, fullgraph=True), tensors, index_TK, dout)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_tf32_only_when_allowed():
    shape = Shape(200, 512, 128, 4, 2)
    check(shape, torch.float32)
    tensors, index_TK = inputs(shape, torch.float32), index(shape)
    dout = normal(shape.T, shape.D, seed=7)
    before = run(experts, tensors, index_TK, dout)["out"]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        loose = run(experts, tensors, index_TK, dout)["out"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    poison()
    exact = run(experts, tensors, index_TK, dout)["out"]
    assert 1e-5 < ((loose - exact).norm() / exact.norm()).item() < 3e-3
    assert torch.equal(exact, before)


@pytest.fixture
def captures(monkeypatch) -> list:
    """A device for each graph that is captured."""
    found, capture = [], generation_hf_moe.capture_cuda_graph
    monkeypatch.setattr(
        generation_hf_moe, "capture_cuda_graph", lambda call, device: found.append(device) or capture(call, device)
    )
    return found


def texts(name: str):
    """A model, prompts whose windows are full or not, and what follows them by one launch after the other."""
    model = tiny_model(name).to("cuda")
    prompts = [random_ids(2, length, seed=length).cuda() for length in (9, 4, 30)]
    prompts[0][0, :3] = 0
    choices = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    as_it_is = choices | {"cache_implementation": "dynamic", "disable_compile": True}
    after = [model.generate(ids, attention_mask=(ids != 0).long(), **as_it_is) for ids in prompts]
    return model, prompts, choices, after


def test_one_graph_decodes_all_texts(variant, captures):
    model, prompts, choices, after = texts(variant)
    for ids, expected in zip(prompts, after, strict=True):
        for texts_on in ("cuda", "cpu"):
            ids = ids.to(texts_on)
            found = model.generate(ids, attention_mask=(ids != 0).long(), **choices)
            assert torch.equal(found, expected.to(texts_on))
    assert len(captures) == 1
    held = torch.cuda.memory_allocated()
    cache = kept_hf_moe._KEPT[model].nbytes
    model.free_generation_memory()
    assert torch.cuda.memory_allocated() <= held - cache


def test_graphs_decode_in_a_cache_of_the_callers(variant, captures):
    model, prompts, choices, after = texts(variant)
    for ids, expected in zip(prompts, after, strict=True):
        cache = StaticCache(config=model.config, max_cache_len=80)
        with torch.no_grad():
            model(ids[:, :3], attention_mask=(ids[:, :3] != 0).long(), past_key_values=cache)
        found = model.generate(ids, attention_mask=(ids != 0).long(), past_key_values=cache, **choices)
        assert torch.equal(found, expected)
    assert len(captures) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", "sandwich"])
def test_no_kernel_is_compiled_anew_for_another_prompt(name, monkeypatch):
    """Lengths that 16 divides and others, whose tiles are the same."""
    model = tiny_model(name).to("cuda", HALF)
    choices = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    compiled = []
    model.generate(random_ids(1, 288).cuda(), **choices)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **found: compiled.append(found["repr"]))
    for length in (299, 304, 306):
        model.generate(random_ids(1, length).cuda(), **choices)
    assert not compiled
