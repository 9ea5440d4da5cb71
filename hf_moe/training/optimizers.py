"""Parameter groups of a mixture, and Muon for its matrices, those of fused experts included.

    trainer = Trainer(..., optimizer_cls_and_kwargs=(MuonAdamW.for_trainer, {"lr": 2e-4, "router": {"lr": 1e-4}}))

Letters: E experts, M rows and N columns of a matrix.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim.adamw import adamw

from .load import experts_in_all, experts_of

KINDS = ("router", "bias", "norm", "experts", "embedding", "matrix")
# Kinds that Muon trains unless told otherwise; the others get AdamW.
MUON_KINDS = ("experts", "matrix")
NO_DECAY = ("router", "bias", "norm")
# The quintic whose iterates send every singular value into about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)


def kinds_of_parameters(model: nn.Module) -> dict[str, str]:
    """The kind, one of `KINDS`, of each parameter that trains, by name.

    Experts' matrices are "experts", what scores the experts is the "router", embeddings and the output head are
    "embedding", other vectors are "norm" or "bias", and everything else (adapters too) is a "matrix".
    """
    modules = dict(model.named_modules())
    experts = experts_of(model)
    routers = {name for path, module in experts.items() for name in _routers_beside(modules, path, module)}
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.add(id(head.weight))

    def kind(name: str, parameter: nn.Parameter) -> str:
        holder, _, last = name.rpartition(".")
        if holder in routers:
            return "router"
        if holder in experts:
            return "experts" if parameter.dim() == 3 else "bias"
        if id(parameter) in embeddings:
            return "embedding"
        if parameter.dim() < 2:
            return "bias" if last.endswith("bias") else "norm"
        return "matrix"

    return {name: kind(name, p) for name, p in model.named_parameters() if p.requires_grad}


def _routers_beside(modules: dict[str, nn.Module], path: str, experts: Any) -> Iterator[str]:
    """Names of the modules that hold a score's weights for each expert, in the block of the experts at a path."""
    # peft wraps the experts and leaves the router beside the wrappers.
    holder, _, own = re.sub(r"(\.base_layer)+$", "", path).rpartition(".")
    for child, part in modules[holder].named_children():
        named = part.named_parameters(prefix=f"{holder}.{child}")
        rows = {name: p.shape[0] for name, p in named if p.dim() == 2 and "lora_" not in name}
        # A shared expert may be as wide as there are experts, but its last matrix is as high as the model.
        if child != own and set(rows.values()) - {1} == {experts_in_all(experts)}:
            yield from (name.rpartition(".")[0] for name, height in rows.items() if height > 1)


def parameter_groups(model: nn.Module, weight_decay: float = 0.0, **by_kind: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups for any optimizer: one a kind, with its name, and no decay of routers, biases and norms.

    Args:
        by_kind: what differs for a kind, as in `router={"lr": 1e-4}`.
    Raises:
        ValueError: a kind that is unknown or has no parameter here.
    """
    parameters, kinds = dict(model.named_parameters()), kinds_of_parameters(model)
    found = {kind: [parameters[name] for name in kinds if kinds[name] == kind] for kind in KINDS}
    for kind in by_kind:
        if not found.get(kind):
            present = ", ".join(kind for kind in KINDS if found[kind])
            raise ValueError(f"{type(model).__name__} has no parameters of kind {kind!r} that train; it has {present}")
    return [
        {
            "params": found[kind],
            "name": kind,
            "weight_decay": 0.0 if kind in NO_DECAY else weight_decay,
            **by_kind.get(kind, {}),
        }
        for kind in KINDS
        if found[kind]
    ]


def orthogonalize(matrix: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """Each matrix with its singular values near 1, by Newton-Schulz: U Vᵀ of U Σ Vᵀ, roughly.

        X ← X / ‖X‖;   steps times:  A = X Xᵀ,  X ← a X + (b A + c A²) X

    Args:
        matrix: (..., M, N); computed in bfloat16, as torch.optim.Muon does. Zeros stay zeros.
    Returns:
        the same shape in bfloat16.
    Cost: steps · (4·m²·n + 2·m³) FLOPs a matrix, m = min(M, N), n = max(M, N).
    Source: Jordan et al., Muon (2024); arXiv:2502.16982.
    """
    a, b, c = QUINTIC
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix.bfloat16().flatten(0, -3) if matrix.dim() > 2 else matrix.bfloat16().unsqueeze(0)
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrix.shape)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `muon=True`, AdamW for the rest; one learning rate suits both.

        momentum  B ← μ B + g            update = orthogonalize(g + μ B) · 0.2 · sqrt(max(M, N))
        weight    W ← (1 - lr · decay) W - lr · update

    The factor gives an update AdamW's typical size. A parameter (E, M, N) is E matrices; one that holds gate and up
    is two for each expert (`halves` of its group: the dimension that holds them, and whether they alternate). A
    parameter that FSDP or expert parallelism cut along its experts needs no communication; other cuts are gathered.

    Args:
        params: groups as of `parameter_groups`, or parameters.
        lr, weight_decay, betas, eps: AdamW's; lr and weight_decay Muon's too.
        momentum: μ.
    Source: arXiv:2502.16982.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        steps: int = 5,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "steps": steps,
            "muon": False,
            "halves": None,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            small = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() < 2]
            if small:
                raise ValueError(f"Muon takes matrices, got a parameter of shape {small[0]}")

    @classmethod
    def for_trainer(cls) -> Callable[..., "MuonAdamW"]:
        """What `Trainer(optimizer_cls_and_kwargs=(MuonAdamW.for_trainer, {...}))` calls."""
        return cls.of_model

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        muon: tuple[str, ...] = MUON_KINDS,
        weight_decay: float = 0.0,
        **by_kind: Any,
    ) -> "MuonAdamW":
        """An optimizer of a model's `parameter_groups`.

        Args:
            muon: kinds that Muon trains.
            by_kind: what differs for a kind; lr, betas, eps, momentum and steps hold for all.
        """
        common = {name: by_kind.pop(name) for name in ("lr", "betas", "eps", "momentum", "steps") if name in by_kind}
        layouts = {
            id(module.get_parameter(name)): (1 if not module.is_transposed else 2, not module.is_concatenated)
            for module in experts_of(model).values()
            for name, _ in module.named_parameters(recurse=False)
            if name == "gate_up_proj"
        }
        groups: list[dict[str, Any]] = []
        for group in parameter_groups(model, weight_decay, **by_kind):
            group["muon"] = group["name"] in muon
            parts: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                parts.setdefault((layouts.get(id(parameter)), mesh), []).append(parameter)
            groups += [{**group, "params": part, "halves": halves} for (halves, _), part in parts.items()]
        return cls(groups, **common)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._muon(parameter, group)
            elif parameters:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.mul_(group["momentum"]).add_(gradient)
        update = _whole(gradient.add(momentum, alpha=group["momentum"]))
        update = _in_halves(update, group["halves"], lambda x: _scaled(orthogonalize(x, group["steps"])))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_cut_as(parameter, update.to(parameter.dtype)), alpha=-group["lr"])

    def _adamw(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                # A tensor, since torch's functional form counts in place.
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _scaled(update: torch.Tensor) -> torch.Tensor:
    return update * (0.2 * math.sqrt(max(update.shape[-2:])))


def _in_halves(
    update: torch.Tensor, halves: tuple[int, bool] | None, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply a function of matrices to the two that a parameter (E, M, N) holds for each expert."""
    if halves is None:
        return function(update)
    dim, alternate = halves
    sizes = (-1, 2) if alternate else (2, -1)
    which = dim + 1 if alternate else dim
    parts = update.unflatten(dim, sizes).movedim(which, 1)
    return function(parts).movedim(1, which).flatten(dim, dim + 1)


def _cut_along_experts(tensor: DTensor) -> bool:
    return tensor.dim() == 3 and all(isinstance(p, Replicate) or p == Shard(0) for p in tensor.placements)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The matrices that a rank has to look at: its own experts', or all where a matrix itself is cut."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if _cut_along_experts(tensor) else tensor.full_tensor()


def _cut_as(parameter: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The update as the parameter is distributed."""
    if not isinstance(parameter, DTensor):
        return update
    mesh, placements = parameter.device_mesh, parameter.placements
    if _cut_along_experts(parameter):
        return DTensor.from_local(
            update, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return distribute_tensor(update, mesh, placements, src_data_rank=None)
