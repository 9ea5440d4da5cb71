"""Time LoRA on experts side by side: ours and peft's, on the same layer or model in the same process.

    python examples/benchmarks/lora.py

Our gradients of A, B and x are checked against float32 first. A row is {case, impl, pass, ms, peak_mib}: impl "hf_moe"
or "peft"; pass "layer" (forward and backward of one expert layer) or "step" (a model's, with AdamW on the adapters).
Ours is the model after `hf_moe.accelerate`, as its users have it; peft's is as Transformers loads it. In the case
"…-compiled" torch.compile has fused what the two steps have in common, attention, norms and loss, in both.
Beside them, for scale: "hf_moe_full" trains the expert weights, "hf_moe_attention" has LoRA on attention alone,
"summed_hf_moe" sums the weights as peft does and gives them to our kernels.
Results go to examples/benchmarks/results/lora-<gpu>.json.

Letters: T tokens, K experts a token, D hidden, F expert width, E experts.
"""

import argparse
import gc
import json
import time
import traceback
from pathlib import Path

import peft
import torch
from experts import SHAPES, Case, commit, versions
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from hf_moe import accelerate
from hf_moe.kernels.layer import experts
from hf_moe.kernels.lora import experts_lora
from hf_moe.training.lora import lora_config

RANK = 16
GIVEN = ("x", "weight", "up_a", "up_b", "down_a", "down_b")


def median_ms(run, budget_ms: float) -> tuple[float, float]:
    """Median time, and the peak of memory above what was there before."""
    run()
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    repeats = min(30, max(5, int(budget_ms / 1e3 / (time.monotonic() - began))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2], peak


def layer_inputs(shape: str, tokens: int) -> dict[str, torch.Tensor]:
    D, F, E, _ = SHAPES[shape]
    inputs = Case(shape, tokens, "uniform").inputs()

    def normal(*size, scale):
        return torch.randn(size, device="cuda").mul_(scale).bfloat16()

    return inputs | {
        "up_a": normal(E, RANK, D, scale=D**-0.5),
        "up_b": normal(E, 2 * F, RANK, scale=0.1),
        "down_a": normal(E, RANK, F, scale=F**-0.5),
        "down_b": normal(E, D, RANK, scale=0.1),
    }


def ours(leaves, inputs):
    return experts_lora(
        leaves["x"], inputs["index"], leaves["weight"], inputs["up"], inputs["down"],
        up_lora=(leaves["up_a"], leaves["up_b"]), down_lora=(leaves["down_a"], leaves["down_b"]),
    )  # fmt: skip


def summed(leaves, inputs):
    """What peft does with the weights, before the same kernels: the base carries a gradient of its full size."""
    up = torch.baddbmm(inputs["up"], leaves["up_b"], leaves["up_a"])
    down = torch.baddbmm(inputs["down"], leaves["down_b"], leaves["down_a"])
    return experts(leaves["x"], inputs["index"], leaves["weight"], up, down)


def check(shape: str) -> None:
    """Our output and gradients against float32, and no worse than twice what summed weights give in bfloat16.

    Raises:
        ValueError: they are.
    """
    inputs = layer_inputs(shape, 512)

    def outcome(dtype, function):
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        leaves = {name: cast[name].detach().requires_grad_() for name in GIVEN}
        out = function(leaves, cast)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cast["dout"])]

    def truth(leaves, cast):
        out = torch.zeros_like(leaves["x"])
        for e in range(cast["up"].shape[0]):
            token, choice = (cast["index"] == e).nonzero(as_tuple=True)
            h = leaves["x"][token] @ (cast["up"][e] + leaves["up_b"][e] @ leaves["up_a"][e]).T
            gate, value = h.chunk(2, -1)
            y = (nn.functional.silu(gate) * value) @ (cast["down"][e] + leaves["down_b"][e] @ leaves["down_a"][e]).T
            out = out.index_add(0, token, y * leaves["weight"][token, choice, None])
        return out

    wanted, plain, found = outcome(torch.float32, truth), outcome(torch.bfloat16, truth), outcome(torch.bfloat16, ours)
    for name, w, p, f in zip(("out", *GIVEN), wanted, plain, found, strict=True):
        error, bound = ((v.float() - w).norm() / w.norm() for v in (f, p))
        if not error <= 2 * bound + 1e-3:
            raise ValueError(f"{shape} {name}: error {error:.2e}, and {bound:.2e} in plain bfloat16")
        print(f"{shape} {name}: error {error:.2e}, plain bfloat16 {bound:.2e}", flush=True)


def layer_rows(shape: str, tokens: int, budget_ms: float):
    inputs = layer_inputs(shape, tokens)

    def both(function, names):
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        return lambda: torch.autograd.grad(function(leaves, inputs), list(leaves.values()), inputs["dout"])

    full = ("x", "weight", "up", "down")
    runs = {
        "hf_moe": both(ours, GIVEN),
        "hf_moe_full": both(lambda le, i: experts(le["x"], i["index"], le["weight"], le["up"], le["down"]), full),
        "summed_hf_moe": both(summed, GIVEN),
        "peft": peft_layer(shape, inputs),
    }
    for impl, run in runs.items():
        gc.collect()
        torch.cuda.empty_cache()
        ms, peak = median_ms(run, budget_ms)
        yield {"case": f"{shape}-{tokens}", "impl": impl, "pass": "layer", "ms": round(ms, 3), "peak_mib": round(peak)}


def olmoe(layers: int, shape: str = "olmoe") -> OlmoeForCausalLM:
    D, F, E, K = SHAPES[shape]
    config = OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=50304 if layers > 1 else 128, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.manual_seed(0)
        return OlmoeForCausalLM(config).bfloat16()


def plain_config() -> LoraConfig:
    return LoraConfig(r=RANK, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


def peft_layer(shape: str, inputs):
    """peft's own wrapper around the same weights, with Transformers' grouped_mm."""
    model = olmoe(1, shape)
    model.set_experts_implementation("grouped_mm")
    wrapper = get_peft_model(model, plain_config()).base_model.model.model.layers[0].mlp.experts
    weight, x = inputs["weight"].detach().requires_grad_(), inputs["x"].detach().requires_grad_()
    leaves = [x, weight, *(p for p in wrapper.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(wrapper(x, inputs["index"], weight), leaves, inputs["dout"])


def compile_common(model: OlmoeForCausalLM) -> None:
    """Everything but router and experts, whose wrapper in peft cannot be compiled."""
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm):
            module.compile(dynamic=False)
    model.model.norm.compile(dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)


def step_row(impl: str, budget_ms: float, compiled: bool = False) -> dict:
    torch.compiler.reset()
    base = olmoe(4)
    if impl == "peft":
        base.set_experts_implementation("grouped_mm")
    else:
        accelerate(base)
    preset = "attention" if impl == "hf_moe_attention" else "experts"
    config = plain_config() if impl == "peft" else lora_config(preset, model=base, r=RANK)
    model = get_peft_model(base, config)
    if compiled:
        compile_common(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    tokens = torch.randint(50304, (4, 2048), device="cuda")

    def step():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ms, _ = median_ms(step, budget_ms)
    # All of it, weights included, as one reads it from the GPU.
    peak = torch.cuda.max_memory_allocated() / 2**20
    case = "olmoe-4-layers-4x2048" + ("-compiled" if compiled else "")
    return {"case": case, "impl": impl, "pass": "step", "ms": round(ms, 2), "peak_mib": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "qwen3-30b"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--budget-ms", type=float, default=400.0, help="time for each figure")
    parser.add_argument("--limit-s", type=float, default=600.0, help="start no case after this")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default=None, help="when there is no git history here")
    args = parser.parse_args()

    began = time.monotonic()
    name = torch.cuda.get_device_name().lower()
    gpu = next((word for word in name.replace("-", " ").split() if word[0] in "abh" and word[1:].isdigit()), name)
    head = {
        "device": torch.cuda.get_device_name(),
        "versions": versions() | {"peft": peft.__version__},
        "commit": args.commit or commit(),
    }
    print(head, flush=True)
    folder = args.out or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []

    def cases():
        for impl in ("hf_moe", "peft", "hf_moe_attention"):
            yield lambda impl=impl: [step_row(impl, args.budget_ms)]
        for shape in args.shapes:
            for tokens in args.tokens:
                yield lambda shape=shape, tokens=tokens: layer_rows(shape, tokens, args.budget_ms)
        for impl in ("hf_moe", "peft"):
            yield lambda impl=impl: [step_row(impl, args.budget_ms, compiled=True)]

    for shape in args.shapes:
        check(shape)
    for make in cases():
        if time.monotonic() - began > args.limit_s:
            print("out of time: the cases that follow are left out", flush=True)
            break
        gc.collect()
        torch.cuda.empty_cache()
        try:
            for row in make():
                rows.append(row)
                print(f"{time.monotonic() - began:5.0f} s", row, flush=True)
        except Exception:
            traceback.print_exc()
        (folder / f"lora-{gpu}.json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
