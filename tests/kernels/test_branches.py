"""Branches of a kernel whose names must agree, compiled for Hopper: the interpreter runs what the compiler refuses."""

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_moe.kernels.latent_entry import _enter_kernel

WIDTHS = {
    "deepseek": {
        "H": 16,
        "G": 1,
        "C": 512,
        "P": 64,
        "N": 128,
        "HAS_NORM": True,
        "HAS_SLOT": True,
        "RING": True,
        "ADVANCE": True,
    },
    "grouped": {
        "H": 9,
        "G": 3,
        "C": 192,
        "P": 64,
        "N": 0,
        "HAS_NORM": False,
        "HAS_SLOT": False,
        "RING": False,
        "ADVANCE": False,
    },
}
BLOCKS = {"INTERLEAVE": True, "CHAINED": True, "BLOCK_H": 16, "BLOCK_G": 4, "BLOCK_C": 512, "BLOCK_N": 128, "HALF": 32}


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_entry_into_the_cache_compiles(widths):
    types = dict.fromkeys(_enter_kernel.arg_names, "constexpr")
    types |= {name: "*bf16" for name in types if name.endswith("_ptr")} | {"slot_ptr": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(["cos_b", "cos_s", "latent_b", "latent_l", "k_rot_b", "k_rot_l", "S", "L"], "i32")
    constants = {(_enter_kernel.arg_names.index(name),): value for name, value in (widths | BLOCKS).items()}
    source = ASTSource(fn=_enter_kernel, signature=types, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
