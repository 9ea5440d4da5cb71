"""Whoever watches an operator sees it whole; where nobody does, its body runs at once."""

import torch
from cases import DEVICE, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_moe.kernels import operators
from hf_moe.kernels.rms_norm import rms_norm

OURS = ["hf_moe.rms_norm.default", "hf_moe.rms_norm_backward.default"]


class Notes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def gradients(x, weight):
    return torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), [x, weight])


def test_a_mode_sees_the_operator_and_its_backward():
    x, weight = normal(3, 32).requires_grad_(), normal(32, seed=1).requires_grad_()
    wanted = gradients(x, weight)
    with Notes() as notes:
        found = gradients(x, weight)
    assert [name for name in notes.seen if name.startswith("hf_moe")] == OURS
    torch.testing.assert_close(found, wanted)


def test_fake_tensors_run_nothing():
    with FakeTensorMode():
        x, weight = torch.empty(3, 32, device=DEVICE).requires_grad_(), torch.empty(32, device=DEVICE).requires_grad_()
        found = gradients(x, weight)
        assert [tuple(gradient.shape) for gradient in found] == [(3, 32), (32,)]


def test_a_compiler_sees_the_operator():
    x, weight = normal(3, 32).requires_grad_(), normal(32, seed=1).requires_grad_()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: rms_norm(x, weight, 1e-6), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), rms_norm(x, weight, 1e-6))
    assert OURS[0] in [str(node.target) for node in graphs[0].graph.nodes]


def test_without_a_gradient_there_is_none():
    x, weight = normal(3, 32).requires_grad_(), normal(32, seed=1).requires_grad_()
    with torch.no_grad():
        assert not rms_norm(x, weight, 1e-6).requires_grad
    assert not torch.ops.hf_moe.rms_norm(x.detach(), weight.detach(), 1e-6, True).requires_grad
    assert torch.ops.hf_moe.rms_norm(x, weight.detach(), 1e-6, True).requires_grad


def test_without_torchs_own_names_the_dispatcher_is_asked(monkeypatch):
    monkeypatch.setattr(operators, "_DIRECT", False)
    library = torch.library.Library("hf_moe", "FRAGMENT")
    library.define("scaled(Tensor x, float factor) -> Tensor")
    scaled = operators.Operator("scaled", lambda x, factor: x * factor, library)
    scaled.register_gradient(
        lambda ctx, dy: (dy * ctx.factor, None), lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1])
    )
    x = normal(3, 4).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(scaled(x, 3.0).sum(), x)[0], torch.full_like(x, 3.0))
    leaves = normal(3, 32).requires_grad_(), normal(32, seed=1).requires_grad_()
    wanted = gradients(*leaves)
    monkeypatch.undo()
    torch.testing.assert_close(gradients(*leaves), wanted)
