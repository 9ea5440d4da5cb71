"""Time expert layers side by side: ours, Transformers' and other packages', on the same inputs in the same minute.

    python examples/benchmarks/experts.py --shapes qwen3-30b olmoe --tokens 8192 32768 --peers grouped_mm sonicmoe

An implementation is checked against float32 first and gets no time when it fails; a peer that is not installed is named
and skipped. Results go to examples/benchmarks/results/experts-<gpu>.json.

Letters: T tokens, K experts a token, D hidden, F expert width, E experts.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

# name → D, F, E, K
SHAPES = {
    "qwen3-30b": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "deepseek-v3-slice": (7168, 2048, 32, 8),
    "mixtral": (4096, 14336, 8, 2),
}
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Case:
    shape: str
    tokens: int
    routing: str

    def inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        D, F, E, K = SHAPES[self.shape]
        make = torch.Generator("cuda").manual_seed(seed)

        def normal(*size, scale=1.0):
            return torch.randn(size, generator=make, device="cuda", dtype=torch.bfloat16).mul_(scale)

        popularity = torch.zeros(E, device="cuda")
        if self.routing == "zipf":
            popularity = -1.5 * torch.arange(1, E + 1, device="cuda").log()
        noise = torch.rand((self.tokens, E), generator=make, device="cuda").clamp_(1e-9, 1 - 1e-7)
        top = (popularity - (-noise.log()).log()).topk(K)
        return {
            "x": normal(self.tokens, D),
            "index": top.indices,
            "weight": top.values.softmax(-1),
            "up": normal(E, 2 * F, D, scale=D**-0.5),
            "down": normal(E, D, F, scale=F**-0.5),
            "dout": normal(self.tokens, D),
        }

    def flops(self) -> int:
        D, F, _, K = SHAPES[self.shape]
        return 6 * self.tokens * K * D * F


class Experts(nn.Module):
    """The module that Transformers' expert functions read, for given weights."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, up, down):
        super().__init__()
        self.num_experts, self.act_fn = up.shape[0], nn.SiLU()
        # Plain attributes: the benchmark's leaves, not parameters.
        object.__setattr__(self, "gate_up_proj", up)
        object.__setattr__(self, "down_proj", down)


def of_transformers(function) -> Layer:
    from transformers.integrations import moe

    Experts._apply_gate = moe._default_apply_gate
    module = None

    def layer(x, index, weight, up, down):
        nonlocal module
        if module is None or module.gate_up_proj is not up or module.down_proj is not down:
            module = Experts(up, down)
        return function(module, x, index, weight)

    return layer


def hf_moe_triton() -> Layer:
    from hf_moe.kernels.experts import experts_forward

    return of_transformers(experts_forward)


def grouped_mm() -> Layer:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return of_transformers(grouped_mm_experts_forward)


def sonicmoe() -> Layer:
    import quack.gemm_interface as interface
    import sonicmoe.functional.reduction_over_k_gather as reduction
    from quack.gemm_config import GemmConfig
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    # Its search over all tiles takes minutes. These are the tiles it is published with.
    wanted = {(128, 192, True, 2, 1)}
    for function in vars(interface).values():
        if hasattr(function, "configs") and hasattr(function, "cache_results"):
            kept = [c for c in function.configs if _sonic_tile(c.kwargs["config"]) in wanted]
            default = type(function.configs[0])(config=GemmConfig(is_dynamic_persistent=False))
            function.configs = kept[:1] or [default]
    # Its row sums search over dozens of blocks: keep the larger ones.
    sums = vars(reduction)["token_gather_sum_kernel"]
    sums.configs = [c for c in sums.configs if c.num_warps == 4 and c.kwargs["BLOCK_H"] in (1024, 2048)]

    def layer(x, index, weight, up, down):
        T, K = index.shape
        token = torch.arange(T, device=x.device, dtype=torch.int32).repeat_interleave(K)
        out, _ = moe_general_routing_inputs(
            x,
            weight.reshape(-1),
            token,
            index.reshape(-1).int(),
            up.permute(1, 2, 0),
            None,
            down.permute(1, 2, 0),
            None,
            E=up.shape[0],
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
            stream_id=None,
        )
        return out

    return layer


def _sonic_tile(config) -> tuple:
    if config.swap_ab or config.device_capacity != 9 or config.is_dynamic_persistent:
        return ()
    return config.tile_m, config.tile_n, config.pingpong, config.cluster_m, config.cluster_n


def liger() -> Layer:
    # Autotuning was not done after 100 s at one shape.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda x, index, weight, up, down: LigerFusedMoEFunction.apply(x, up, down, index.int(), weight)


def scattermoe() -> Layer:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def layer(x, index, weight, up, down):
        order = flatten_sort_count(index, num_experts=up.shape[0])
        h = parallel_linear(x, up.transpose(1, 2), index.shape[1], *order, grouped_out=True)
        gate, value = h.chunk(2, -1)
        a = nn.functional.silu(gate) * value
        return parallel_linear(a, down.transpose(1, 2), 1, *order, grouped_in=True, gates=weight.to(x.dtype))

    return layer


def cublas_balanced() -> Layer:
    """Batched products on tokens already sorted and evenly spread: the arithmetic alone; its result is no layer's."""

    def layer(x, index, weight, up, down):
        E, rows = up.shape[0], index.numel() // up.shape[0]
        x_END = x.repeat(index.shape[1], 1)[: E * rows].view(E, rows, -1)
        gate, value = torch.bmm(x_END, up.transpose(1, 2)).chunk(2, -1)
        return torch.bmm(nn.functional.silu(gate) * value, down.transpose(1, 2))

    return layer


IMPLEMENTATIONS = {f.__name__: f for f in (hf_moe_triton, grouped_mm, sonicmoe, liger, scattermoe, cublas_balanced)}
LEAVES = ("x", "weight", "up", "down")


def truth(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients in float32, one expert at a time."""
    leaves = {name: inputs[name].float().requires_grad_() for name in LEAVES}
    x, weight, up, down = leaves.values()
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        token, choice = (inputs["index"] == e).nonzero(as_tuple=True)
        gate, value = (x[token] @ up[e].T).chunk(2, -1)
        y = (nn.functional.silu(gate) * value) @ down[e].T
        out = out.index_add(0, token, y * weight[token, choice, None])
    return [out.detach(), *torch.autograd.grad(out, [x, weight, up, down], inputs["dout"].float())]


def outcome(layer: Layer, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in LEAVES}
    out = layer(leaves["x"], inputs["index"], leaves["weight"], leaves["up"], leaves["down"])
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), inputs["dout"])]


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [((f.float() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]


def milliseconds(run: Callable[[], object], budget_ms: float, flush: torch.Tensor) -> float:
    """The median of repeated runs, each with a cold L2."""
    run()
    torch.cuda.synchronize()
    began = time.monotonic()
    run()
    torch.cuda.synchronize()
    # Queued together, so that the GPU need not wait for Python between runs that are long enough.
    repeats = min(50, max(5, int(budget_ms / 1e3 / (time.monotonic() - began))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def measure(name: str, layer: Layer, case: Case, rel_error: list[float], budget_ms: float, flush) -> Iterator[dict]:
    inputs = case.inputs()
    leaves = {key: inputs[key].requires_grad_() for key in LEAVES}

    def forward():
        return layer(leaves["x"], inputs["index"], leaves["weight"], leaves["up"], leaves["down"])

    def inference():
        with torch.no_grad():
            return forward()

    def both():
        out = forward()
        dout = inputs["dout"] if out.shape == inputs["dout"].shape else out
        return torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)

    common = {"op": "experts", "shape": case.shape, "tokens": case.tokens, "routing": case.routing, "impl": name}
    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = forward()
    saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    del out
    for label, run, factor, error in (
        ("forward", inference, 1, rel_error[0]),
        ("forward+backward", both, 3, max(rel_error)),
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        ms = milliseconds(run, budget_ms, flush)
        yield common | {
            "pass": label,
            "ms": round(ms, 4),
            "tflops": round(factor * case.flops() / ms / 1e9, 1),
            "saved_mib": round(saved / 2**20, 1) if factor == 3 else 0.0,
            "peak_mib": round(peak / 2**20, 1),
            "rel_error": error,
        }


def ceilings(flush) -> dict[str, float]:
    """What this GPU does at best: a large matrix product, and a large copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return {
        "matmul_tflops": round(2 * 8192**3 / milliseconds(lambda: a @ b, 400, flush) / 1e9, 1),
        "copy_tb_s": round(2 * source.numel() / milliseconds(lambda: target.copy_(source), 200, flush) / 1e9, 2),
    }


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "transformers", "sonic-moe", "quack-kernels", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--routing", nargs="+", default=["uniform", "zipf"], choices=["uniform", "zipf"])
    parser.add_argument("--peers", nargs="*", default=list(IMPLEMENTATIONS)[1:], choices=list(IMPLEMENTATIONS)[1:])
    parser.add_argument("--budget-ms", type=float, default=250.0, help="time for each figure")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default=None, help="when there is no git history here")
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    name = torch.cuda.get_device_name().lower()
    gpu = next((word for word in name.split() if word[0] in "abh" and word[1:].isdigit()), name.split()[-1])
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    result = {"device": torch.cuda.get_device_name(), "versions": versions(), "commit": args.commit or commit()}
    result["ceilings"] = ceilings(flush)
    print(result, flush=True)

    layers: dict[str, Layer] = {}
    for name in ("hf_moe_triton", *args.peers):
        try:
            layers[name] = IMPLEMENTATIONS[name]()
        except Exception as error:  # a peer may fail to import in any way: say so and go on
            print(f"{name}: skipped, {type(error).__name__}: {error}", flush=True)

    folder = args.out or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for shape in args.shapes:
        checked: dict[str, list[float]] = {}
        _, _, E, K = SHAPES[shape]
        # Few rows an expert, and then enough for the kernels of large batches.
        for size in (256, 128 * E // K):
            small = Case(shape, size, "uniform").inputs(seed=1)
            wanted = truth(small)
            bound = [2 * e + 1e-3 for e in errors(outcome(grouped_mm(), small), wanted)]
            for name, layer in list(layers.items() if size == 256 else [(n, layers[n]) for n in checked]):
                began = time.monotonic()
                try:
                    found = [0.0] if name == "cublas_balanced" else errors(outcome(layer, small), wanted)
                except Exception as error:
                    print(f"{shape} {name}: failed, {type(error).__name__}: {str(error)[:300]}", flush=True)
                    checked.pop(name, None)
                    continue
                if name != "cublas_balanced" and not all(f <= b for f, b in zip(found, bound, strict=True)):
                    print(f"{shape} {name}: wrong, errors {found} over {bound}", flush=True)
                    checked.pop(name, None)
                    continue
                checked[name] = [max(pair) for pair in zip(found, checked.get(name, found), strict=True)]
                took = time.monotonic() - began
                print(f"{shape} {name}: checked with {size} tokens, first call {took:.1f} s", flush=True)
            del small, wanted
        for tokens in args.tokens:
            for routing in args.routing:
                for name, found in checked.items():
                    if name == "cublas_balanced" and routing != "uniform":
                        continue
                    torch.cuda.empty_cache()
                    try:
                        new = list(
                            measure(name, layers[name], Case(shape, tokens, routing), found, args.budget_ms, flush)
                        )
                    except Exception as error:
                        print(f"{shape} {tokens} {routing} {name}: failed, {str(error)[:300]}", flush=True)
                        continue
                    rows += new
                    print(
                        f"{shape:17} {tokens:6} {routing:7} {name:15}",
                        *(
                            f"{r['ms']:9.3f} ms {r['tflops']:6.0f} TFLOP/s "
                            f"{r['tflops'] / result['ceilings']['matmul_tflops']:5.0%}"
                            for r in new
                        ),
                        f"saved {new[-1]['saved_mib']:.0f} peak {new[-1]['peak_mib']:.0f} MiB",
                        flush=True,
                    )
                # Written as it grows: a long run that is cut short keeps what it has.
                (folder / f"experts-{gpu}.json").write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
