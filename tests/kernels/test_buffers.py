"""What the compiler makes of a loop for Hopper, read from its output: no GPU is needed."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_rows_that_are_stored_and_multiplied_are_not_copied_over_while_a_product_reads_them():
    from hf_moe.kernels.spread_low_rank import _spread_low_rank_kernel

    constants = {
        "STORE": True,
        "BINS": 64,
        "BITS": 12,
        "BM": 64,
        "BK": 128,
        "BR": 16,
        "PRECISION": "tf32",
        "a_stride_d": 1,
    }
    pointers = dict.fromkeys(("x_ptr", "a_ptr", "y_ptr", "z_ptr"), "*bf16") | {
        "row_ptr": "*i32",
        "offset_ptr": "*i32",
    }
    kernel = _spread_low_rank_kernel.jit
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [name for name in names if name in pointers or name in ("D", "R", "x_stride", "a_stride_e", "a_stride_r")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3}).asm[
        "ttgir"
    ]
    # Two steps are copied ahead. A product may run on into the next step only if its rows have a third buffer.
    rows = int(re.search(r"local_alloc.*?memdesc<(\d+)x64x128xbf16", text).group(1))
    running = max(int(number) for number in re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", text))
    assert running <= rows - 2
