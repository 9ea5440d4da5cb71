"""What the compiler makes of the kernels for Hopper: no GPU is needed."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


def compiled(kernel, constants, blocks, floats=(), aligned=()):
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    types = {name: f"tensordesc<bf16{block},{NVMMASharedLayout(128, 16, rank=len(block))}>" for name, block in blocks}
    types |= dict.fromkeys(floats, "fp32") | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    types = {
        name: types.get(name, "*i32" if name.endswith("_ptr") else "*bf16" if name == "x" or name == "left" else "i32")
        for name in names
    }
    divisible = [i for i, name in enumerate(names) if types[name].startswith("*") or name in aligned]
    source = GluonASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})


def check(kernel):
    assert kernel.metadata.shared <= 232448
    products = re.findall(r"HGMMA\.64x256x16\S* .*", kernel.asm["sass"])
    assert len(products) >= 40
    # Four products are waited for together. The compiler would wait for each if it thought that it must.
    assert 4 * sum("gsb0" in line for line in products) == len(products)
    assert "LDGSTS" in kernel.asm["sass"]


def test_products_are_not_serialised():
    from hf_moe.kernels.grouped_hopper import _grouped_kernel

    constants = {"GATED": False, "STORE_H": False, "IN_FIRST": True, "GATHER": True}
    constants |= {"ACT": "swish", "CLIP": False, "GROUP": 8}
    out = [1, 1, 64, 1, 64]
    blocks = [("w", [1, 64, 256]), ("y", out), ("a", out)]
    check(compiled(_grouped_kernel.jit, constants, blocks, ("alpha", "limit", "up_offset"), ("N_IN", "x_stride")))


def test_products_of_a_weight_gradient_are_not_serialised():
    from hf_moe.kernels.weight_gradient_hopper import _weight_gradient_kernel

    constants = {"LEFT_GATHER": True, "RIGHT_GATHER": False, "GROUP": 8}
    blocks = [("right", [1, 1, 64, 256]), ("dw", [1, 64, 64])]
    check(
        compiled(_weight_gradient_kernel.jit, constants, blocks, (), ("left_stride", "right_stride", "N_OUT", "N_IN"))
    )
