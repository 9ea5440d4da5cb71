"""How often prompts and texts of all lengths make Triton compile, counted by what it would look a kernel up with."""

import collections
import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import jit

import hf_moe.kernels

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")

LENGTHS = [*range(1, 40), *range(63, 67), *range(126, 131), 200, 257, 384, 517, 760, 1023, 1024, 2032, 3001, 4096]


class Idle:
    """A compiled kernel, when it is launched again."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


HOPPER = {"nvidia_generation": 9, "has_copy_engine": True, "processors": 132, "chains": True}
AMD = {"nvidia_generation": 0, "has_copy_engine": False, "processors": 304, "chains": False}


@pytest.fixture(params=["hopper"])
def compiled(request, monkeypatch):
    """Name of each kernel → what it was compiled for, on a GPU that launches nothing. Tensors are on the CPU."""
    found, binders = collections.defaultdict(set), {}
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns without
    hopper = request.param == "hopper"
    backend = make_backend(GPUTarget("cuda", 90, 32) if hopper else GPUTarget("hip", "gfx942", 64))
    options_of_backend = vars(backend.parse_options({})).keys()

    def run(self, *arguments, grid, warmup, **options):
        known = {*options_of_backend, *self.arg_names}
        assert not (unknown := options.keys() - known), f"{self.fn.__name__} is launched with {unknown}"
        if self not in binders:
            binders[self] = jit.create_function_from_signature(self.signature, self.params, backend)
        _, kinds, options = binders[self](*arguments, **options)
        found[self.fn.__name__].add(str((kinds, sorted(options.items()))))
        return Idle()

    modules = [
        importlib.import_module(f"hf_moe.kernels.{m.name}") for m in pkgutil.iter_modules(hf_moe.kernels.__path__)
    ]
    by_name = {module.__name__.rpartition(".")[2]: module for module in modules}
    tuning, launching = by_name["tuning"], by_name["launching"]
    facts = HOPPER if hopper else AMD
    stand_ins = {name: lambda device, value=value: value for name, value in facts.items()}
    theirs = {name: getattr(tuning, name) for name in ("choose", "single_rows_tile", "small_batch_tile")}
    for name, function in theirs.items():

        def on_a_gpu(*arguments, choose=function):
            gpu = torch.device("cuda", 0)
            return choose.__wrapped__(*[gpu if isinstance(a, torch.device) else a for a in arguments])

        stand_ins[name] = on_a_gpu
    for module in modules:
        for name in stand_ins.keys() & vars(module).keys():
            # `latent_decode` has a `choose` of its own.
            if name in facts or getattr(module, name) is theirs[name]:
                monkeypatch.setattr(module, name, stand_ins[name])
    tiles = tuning.HOPPER if hopper else dict.fromkeys(tuning.HOPPER, tuning._ANY)
    monkeypatch.setattr(tuning, "_tables", lambda device: tiles)
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: -1)))
    by_name["layer"].Plan.of.cache_clear()
    yield found
    by_name["layer"].Plan.of.cache_clear()


def counts(compiled) -> dict[str, int]:
    return {name: len(kinds) for name, kinds in sorted(compiled.items())}


def empty(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype)


@torch.no_grad()
def prompts(lengths):
    """One layer's kernels on prompts."""
    from hf_moe.kernels.latent_entry import latent_entry
    from hf_moe.kernels.layer import experts
    from hf_moe.kernels.rms_norm import add_rms_norm, rms_norm

    D, F, E, K, H, N, P, C = 512, 256, 16, 4, 4, 32, 16, 64
    up, down, norm = empty(E, 2 * F, D), empty(E, D, F), empty(D)
    for T in lengths:
        x, table = empty(T, D), empty(1, T, P)
        rms_norm(x, norm, 1e-6)
        add_rms_norm(x, x, norm, 1e-6)
        sizes = {"heads": H, "nope": N, "latent_width": C, "interleave": True}
        latent_entry(empty(1, T, H * (N + P)), empty(1, T, C + P), table, table, norm_C=empty(C), eps=1e-6, **sizes)
        experts(x, empty(T, K, dtype=torch.long), empty(T, K), up, down)


@torch.no_grad()
def texts(monkeypatch, batch):
    """A step's attention on texts that grow."""
    from hf_moe.kernels import latent_decode

    monkeypatch.setattr(latent_decode, "_latent_decode", latent_decode._latent_decode._init_fn)
    H, P, C, V = 4, 16, 512, 32
    for L in range(256, 8192 + 1, 256):
        latent_decode.latent_decode(
            empty(batch, H, 1, C), empty(batch, H, 1, P), empty(batch, 1, L, C), empty(batch, 1, L, P), scaling=1.0,
            attention_mask=empty(batch, 1, 1, L, dtype=torch.bool), end_B=empty(1, dtype=torch.long),
            value_HVC=empty(H, V, C),
        )  # fmt: skip


def test_prompts(compiled):
    prompts(LENGTHS)
    assert counts(compiled) == {
        # One for each tile of `tuning.HOPPER`, the tallest of which is a kernel of its own for the first projection.
        "_grouped_linear_kernel": 3,
        "_up_projection_kernel": 2,
        "_grouped_kernel": 1,
        # Tile heights, and how many routes are read at once.
        "_route_kernel": 7,
        "_count_kernel": 1,
        "_scan_kernel": 1,
        "_place_kernel": 1,
        "_combine_kernel": 1,
        # Up to 128 tokens: both projections, of few tokens or by expert, of up to 16 tokens or more.
        "_expert_rows_kernel": 6,
        "_weigh_kernel": 1,
        "_single_rows_kernel": 2,
        # One token, and more.
        "_enter_kernel": 2,
        # A row at a time, and four.
        "_rms_norm_kernel": 2,
    }


@pytest.mark.parametrize(("batch", "joining"), [(1, "_join_values_kernel"), (16, "_join_kernel")])
def test_texts(compiled, batch, joining, monkeypatch):
    texts(monkeypatch, batch)
    assert counts(compiled) == {"_attend_kernel": 3 if batch == 1 else 2, joining: 2}


@pytest.mark.parametrize("compiled", ["amd"], indirect=True)
def test_amd_knows_every_option_of_a_launch(compiled, monkeypatch):
    prompts((1, 16, 517))
    texts(monkeypatch, 1)
    assert {"_single_rows_kernel", "_expert_rows_kernel", "_grouped_linear_kernel", "_attend_kernel"} <= compiled.keys()
