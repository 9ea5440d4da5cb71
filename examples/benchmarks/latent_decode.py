"""Time attention on a cache of latents, one step of one layer, beside the expanded form that Transformers computes.

    python examples/benchmarks/latent_decode.py --cases 16x64x4096 128x64x4096

A case is HEADSxBATCHxCONTEXT, bf16, DeepSeek's widths. Layouts: `dense`, all of a cache; `static`, the written half of
one, beside a mask of padding; `pages`, of 64 tokens in any order. Each is checked against float64 before it is timed,
by replaying a captured graph over more caches than the L2 holds. `share_of_limit` is the least time for the cache's
bytes or for the operations, over the time taken. Results go to examples/benchmarks/results/latent-decode-<gpu>.json.

Letters: B batch, H heads, L cached tokens, C latent width, P rotary width, N and V widths of an expanded head.
"""

import argparse
import json
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from experts import commit, versions
from torch import Tensor
from torch.nn import functional

from hf_moe.kernels import reference
from hf_moe.kernels.latent_decode import latent_decode, latent_decode_packed

C, P, N, V = 512, 64, 128, 128
SCALE = (N + P) ** -0.5
PAGE = 64
BYTES_PER_S, FLOPS_PER_S = 3.0e12, 790e12  # of a large copy and of a large product, one H100
CASES = [
    *("16x64x4096", "16x16x8192", "16x1x65536", "16x1x8192", "16x1x1024"),
    *("128x64x4096", "128x128x4096", "128x16x8192", "128x1x65536"),
]


class Case:
    """One cache, its queries, and the calls on them."""

    def __init__(self, H: int, B: int, L: int, layout: str, seed: int):
        make = torch.Generator("cuda").manual_seed(seed)
        normal = lambda *size: torch.randn(size, generator=make, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.H, self.B, self.L, self.layout = H, B, L, layout
        self.q_latent, self.q_rot = normal(B, H, 1, C), normal(B, H, 1, P)
        slots = 2 * L if layout == "static" else L
        if layout == "pages":
            half = (C + P) // 2
            memory = normal(2 * B * L + PAGE, half)
            order = torch.randperm(B * L // PAGE, generator=make, device="cuda")
            at = torch.arange(PAGE, device="cuda")
            self.slots = (order[:, None] * 2 * PAGE + at).flatten()
            self.latent, self.k_rot = memory[:-PAGE], memory[PAGE:]
            self.start = torch.arange(B + 1, device="cuda", dtype=torch.int32)
        else:
            self.latent, self.k_rot = normal(B, 1, slots, C), normal(B, 1, slots, P)
        self.end = torch.tensor([L], device="cuda")
        self.mask = torch.arange(slots, device="cuda").lt(L).repeat(B, 1, 1, 1)

    def run(self) -> Tensor:
        """(B, H, 1, C)."""
        if self.layout == "pages":
            queries = (x.squeeze(2).transpose(0, 1).unsqueeze(0) for x in (self.q_latent, self.q_rot))
            out = latent_decode_packed(
                *queries, self.latent, self.k_rot, query_start=self.start, key_start=self.start * self.L,
                longest_query=1, longest_key=self.L, slot_L=self.slots, latent_width=C, rotary_width=P, scaling=SCALE,
            )  # fmt: skip
            return out.squeeze(0).transpose(0, 1).unsqueeze(2)
        options = {"attention_mask": self.mask, "end_B": self.end} if self.layout == "static" else {}
        return latent_decode(self.q_latent, self.q_rot, self.latent, self.k_rot, scaling=SCALE, **options)

    def keys(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Latents and rotary keys of the first sequences, (sequences, 1, L, width)."""
        if self.layout == "pages":
            slots = self.slots[: sequences * self.L]
            tokens = torch.cat((self.latent[slots], self.k_rot[slots]), -1).view(sequences, 1, self.L, C + P)
            return tokens[..., :C], tokens[..., C:]
        return self.latent[:sequences, :, : self.L], self.k_rot[:sequences, :, : self.L]

    def errors(self) -> tuple[float, float]:
        """Error of the kernel and of plain PyTorch in bf16, each over the size of the float64 result."""
        few = min(self.B, 2)
        tensors = self.q_latent[:few], self.q_rot[:few], *self.keys(few)
        truth = reference.latent_decode(*(t.double() for t in tensors), scaling=SCALE)
        plain = reference.latent_decode(*tensors, scaling=SCALE)
        ours = self.run()[:few]
        return tuple(float((x - truth).norm() / truth.norm()) for x in (ours, plain))


def expanded(case: Case) -> Callable[[], Tensor]:
    """Keys and values of all heads from all latents, then PyTorch's attention: what a step costs without absorption."""
    w = torch.randn(case.H * (N + V), C, device="cuda", dtype=torch.bfloat16) * C**-0.5
    query = torch.randn(case.B, case.H, 1, N + P, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        kv = functional.linear(case.latent.squeeze(1), w).unflatten(-1, (case.H, N + V)).transpose(1, 2)
        key = torch.cat((kv[..., :N], case.k_rot.expand(-1, case.H, -1, -1)), -1)
        return functional.scaled_dot_product_attention(query, key, kv[..., N:])

    return run


def microseconds(calls: list[Callable[[], Tensor]], repeats: int = 11) -> float:
    """Median time of one call, from replays of a graph that holds them all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return sorted(times[1:])[repeats // 2]


def measure(H: int, B: int, L: int, layout: str) -> dict:
    size, operations = 2 * B * L * (C + P), 2 * B * H * L * (2 * C + P)
    count = max(2, min(40, -(-200_000_000 // size)))
    row = {"op": "latent_decode", "impl": "hf_moe", "layout": layout, "heads": H, "batch": B, "context": L}
    if layout == "expanded":
        us = microseconds([expanded(Case(H, B, L, "dense", seed)) for seed in range(2)])
        return row | {"impl": "sdpa", "us": us}
    cases = [Case(H, B, L, layout, seed) for seed in range(count)]
    error, plain = cases[0].errors()
    if not error <= 2 * plain:
        raise ValueError(f"an error of {error:.2e}, where plain PyTorch has {plain:.2e}: not timed")
    us = microseconds([case.run for case in cases])
    least = max(size / BYTES_PER_S, operations / FLOPS_PER_S) * 1e6
    return row | {
        "us": us,
        "gb_per_s": size / us / 1000,
        "tflops": operations / us / 1e6,
        "share_of_limit": least / us,
        "rel_error": error,
        "rel_error_plain": plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--layouts", nargs="*", default=["dense", "static", "pages", "expanded"])
    parser.add_argument("--commit", help="of the code that runs; what git says where it is left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU")
    gpu = torch.cuda.get_device_name()
    label = next((name for name in ("h100", "h200", "a100") if name in gpu.lower()), gpu.lower().replace(" ", "-"))
    path = arguments.out / f"latent-decode-{label}.json"
    result = {"device": gpu, "versions": versions(), "commit": arguments.commit or commit(), "rows": []}
    for case in arguments.cases:
        H, B, L = (int(n) for n in case.split("x"))
        for layout in arguments.layouts:
            if layout == "expanded" and B * H * L * (2 * N + V + P) * 4 > 40e9:
                continue  # its keys and values alone would fill the GPU
            try:
                row = measure(H, B, L, layout)
            except (RuntimeError, ValueError):
                traceback.print_exc()
                continue
            finally:
                torch.cuda.empty_cache()
            result["rows"].append(row)
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
