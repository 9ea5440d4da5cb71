"""When a launch may go to the kernel of an earlier one, and what that kernel is called with."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from hf_moe.kernels import launching


class Jit:
    """Notes every compilation; its kernels note their calls."""

    arg_names = ("x", "n", "SIZE", "ODD")

    def __init__(self):
        self.compiled, self.called = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return self

        def call(*arguments):
            self.called.append((grid, arguments))

        return call if len(grid) == 3 else run


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    return Jit()


def test_the_same_launch_again_goes_to_the_compiled_kernel_with_the_constants_in_their_order(jit):
    kernel, x, y = launching.Launched(jit), torch.zeros(64), torch.ones(64)
    kernel[2,](x, 7, ODD=True, SIZE=16, num_warps=4)
    kernel[5, 3](y, 7, ODD=True, SIZE=16, num_warps=4)
    assert [grid for grid, _, _ in jit.compiled] == [(2,)]
    ((grid, (found, *rest)),) = jit.called
    assert grid == (5, 3, 1)
    assert found is y
    assert rest == [7, 16, True]


def test_whatever_changes_the_kernel_compiles_again(jit, monkeypatch):
    kernel, x = launching.Launched(jit), torch.zeros(64)
    options = {"SIZE": 16, "ODD": True, "num_warps": 4}

    def described(rows):
        return TensorDescriptor(x.view(4, 16), [4, 16], [16, 1], [rows, 16])

    launches = [
        ((x, 7), options),
        ((x.half(), 7), options),
        ((x[1:], 7), options),
        ((None, 7), options),
        ((x, 8), options),
        ((described(2), 7), options),
        ((described(4), 7), options),
        ((x, 7), options | {"SIZE": 32}),
        ((x, 7), options | {"num_warps": 8}),
    ]
    for arguments, chosen in launches * 2:
        kernel[1,](*arguments, **chosen)
    assert len(jit.compiled) == len(jit.called) == len(launches)
    monkeypatch.setattr(launching.driver.active, "get_current_device", lambda: 1)
    kernel[1,](x, 7, **options)
    assert len(jit.compiled) == len(launches) + 1


def test_what_is_remembered_has_an_end(jit, monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 3)
    kernel = launching.Launched(jit)
    for n in range(20):
        kernel[1,](None, n, SIZE=16, ODD=True)
        assert len(kernel._compiled) <= 3


def test_in_the_interpreter_a_function_stays_as_it_is():
    function = object()
    assert launching.launched(function) is function
