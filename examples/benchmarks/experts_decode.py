"""Time expert layers of few tokens against the bytes of the experts that these choose.

    python examples/benchmarks/experts_decode.py --shapes qwen3-30b olmoe --tokens 1 8 64

A CUDA graph holds several calls, each with other routes and another copy of the weights than the one before, so that
none finds its weights in L2, and its replays are timed. An implementation whose numbers are not float32's gets no time.
Results go to examples/benchmarks/results/experts-decode-<gpu>.json.

Letters: T tokens, K experts a token, D hidden, F expert width, E experts.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from experts import SHAPES, Case, Layer, commit, errors, grouped_mm, hf_moe_triton, of_transformers, versions
from torch import nn

# Measured on that GPU: a large copy, read + written.
BYTES_PER_S = {"h100": 3.0e12, "h200": 4.26e12}
CALLS, COPIES = 8, 2


def batched_mm() -> Layer:
    from transformers.integrations.moe import batched_mm_experts_forward

    return of_transformers(batched_mm_experts_forward)


IMPLEMENTATIONS = {f.__name__: f for f in (hf_moe_triton, grouped_mm, batched_mm)}


def floor_bytes(shape: str, index_TK: torch.Tensor) -> int:
    """The weights of the distinct experts, in bf16."""
    D, F, _, _ = SHAPES[shape]
    return 6 * D * F * index_TK.unique().numel()


def truth(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The layer in float32, one expert at a time."""
    x, weight = inputs["x"].float(), inputs["weight"].float()
    out = torch.zeros_like(x)
    for e in inputs["index"].unique().tolist():
        token, choice = (inputs["index"] == e).nonzero(as_tuple=True)
        gate, value = (x[token] @ inputs["up"][e].float().T).chunk(2, -1)
        y = (nn.functional.silu(gate) * value) @ inputs["down"][e].float().T
        out.index_add_(0, token, y * weight[token, choice, None])
    return out


def graph_us(run: Callable[[int], object]) -> float:
    """Microseconds a call, the median of graph replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in range(COPIES):
            run(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            run(call)
    for _ in range(2):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(15)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[len(events) // 2] * 1000 / CALLS


def rows(shape: str, tokens: list[int], names: list[str], bytes_per_s: float) -> Iterator[dict]:
    copies = [Case(shape, 1, "uniform").inputs(seed) for seed in range(COPIES)]
    weights = [{key: copy[key] for key in ("up", "down")} for copy in copies]
    layers = {name: IMPLEMENTATIONS[name]() for name in names}
    for T in tokens:
        D, _, E, K = SHAPES[shape]
        make = torch.Generator("cuda").manual_seed(T)
        x = torch.randn((T, D), generator=make, device="cuda", dtype=torch.bfloat16)
        routes = [torch.rand((T, E), generator=make, device="cuda").topk(K) for _ in range(CALLS)]
        calls = [
            {"x": x, "index": top.indices, "weight": top.values.softmax(-1), **weights[call % COPIES]}
            for call, top in enumerate(routes)
        ]
        wanted = truth(calls[0])
        bound = 2 * errors([grouped_mm()(**calls[0])], [wanted])[0] + 1e-3
        needed = sum(floor_bytes(shape, call["index"]) for call in calls) / CALLS
        for name, layer in layers.items():
            # It copies the weights of every route.
            if name == "batched_mm" and T > 1:
                continue
            try:
                (error,) = errors([layer(**calls[0])], [wanted])
                if not error <= bound:
                    print(f"{shape} T={T} {name}: wrong, error {error:.2e} over {bound:.2e}", flush=True)
                    continue
                us = graph_us(lambda call, layer=layer, calls=calls: layer(**calls[call]))
            except RuntimeError as failure:
                print(f"{shape} T={T} {name}: failed, {str(failure)[:300]}", flush=True)
                continue
            floor = needed / bytes_per_s * 1e6
            yield {
                "op": "experts-decode",
                "shape": shape,
                "tokens": T,
                "impl": name,
                "us": round(us, 2),
                "floor_us": round(floor, 2),
                "ratio": round(us / floor, 3),
                "gb_per_s": round(needed / us / 1e3, 1),
                "rel_error": error,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b", "olmoe", "deepseek-v2-lite"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**n for n in range(11)])
    parser.add_argument("--peers", nargs="*", default=["grouped_mm", "batched_mm"], choices=list(IMPLEMENTATIONS)[1:])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", default=None, help="when there is no git history here")
    args = parser.parse_args()

    gpu = torch.cuda.get_device_name()
    label = next((name for name in BYTES_PER_S if name in gpu.lower()), None)
    if label is None:
        raise SystemExit(f"the memory bandwidth of {gpu} is not in the table {BYTES_PER_S}")
    result = {"device": gpu, "versions": versions(), "commit": args.commit or commit()}
    result |= {"bytes_per_s": BYTES_PER_S[label], "rows": []}
    path = args.out / f"experts-decode-{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for shape in args.shapes:
            for row in rows(shape, args.tokens, ["hf_moe_triton", *args.peers], BYTES_PER_S[label]):
                result["rows"].append(row)
                print(row, flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
