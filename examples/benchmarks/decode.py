"""Time decode steps of a whole model, through `generate`, beside Transformers' DeepseekV3 on the same weights.

    python examples/benchmarks/decode.py --size v2-lite --cases 1x1024 16x8192

Both models are checked against each other before anything is timed. Row "generate" is the very first call, cold, with
nothing but defaults: `first_call_s` for a prompt and 16 tokens. A case BATCHxCONTEXT begins with a cache of random
latents; its time a step is that of a long call of `generate` less that of a short one, and `first_call_s` that of the
first call of the case. Results go to examples/benchmarks/results/decode-<gpu>.json; plot_decode.py draws them.

Letters: B batch, L cached tokens, C latent width, P rotary width, E experts, K experts a token.
"""

import argparse
import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from experts import commit, versions
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.model.growing_hf_moe import grow_in_place

SHAPES = {
    "v2-lite": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
    },
}
COMMON = {
    "num_key_value_heads": 16,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = "1x1024 1x4096 1x16384 1x65536 16x4096 64x4096 16x8192"
IMPLEMENTATIONS = ("hf_moe", "transformers-dynamic", "transformers-static")
BYTES_PER_S = {"h100": 3.0e12, "h200": 4.26e12}  # of a large copy, read and written; elsewhere there is no floor


def build(size: str, device: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Our model and Transformers', on the same tensors."""
    torch.manual_seed(0)
    options = SHAPES[size] | COMMON
    ours_only = {
        "num_key_value_heads": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            ours = HfMoeForCausalLM(HfMoeConfig(**options | ours_only)).eval()
        config = DeepseekV3Config(**options)
        with torch.device("meta"):
            theirs = DeepseekV3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    theirs.load_state_dict(ours.state_dict(), assign=True, strict=True)
    theirs.model.rotary_emb = DeepseekV3RotaryEmbedding(config).to(device)
    for model in (ours, theirs):
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return {"hf_moe": ours, "transformers-dynamic": theirs, "transformers-static": theirs}


@torch.no_grad()
def difference(models: dict[str, torch.nn.Module], device: str) -> float:
    """Largest difference of logits over the largest logit, for a prompt and for three steps after it."""
    vocab = models["hf_moe"].config.vocab_size
    ids = torch.randint(0, vocab, (2, 67), generator=torch.Generator().manual_seed(1)).to(device)
    out = {}
    for name in ("hf_moe", "transformers-dynamic"):
        model = models[name]
        cache = (StaticCache if name == "hf_moe" else DynamicCache)(config=model.config, **(
            {"max_cache_len": 80} if name == "hf_moe" else {}
        ))  # fmt: skip
        logits = [model(ids[:, :64], past_key_values=cache).logits[:, -1]]
        logits += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(64, 67)]
        out[name] = torch.stack(logits).float()
    ours, theirs = out["hf_moe"], out["transformers-dynamic"]
    return float((ours - theirs).abs().max() / theirs.abs().max())


def floor_bytes(model, batch: int, context: int) -> int:
    """Bytes that a step must read: the weights of experts hit (expected), all others but the embedding, the cache."""
    config = model.config
    experts = [m for m in model.modules() if hasattr(m, "gate_up_proj") and m.gate_up_proj.ndim == 3]
    held = sum(m.gate_up_proj.nbytes + m.down_proj.nbytes for m in experts)
    rest = sum(p.nbytes for p in model.parameters()) - held - model.get_input_embeddings().weight.nbytes
    hit = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache = batch * context * width * config.num_hidden_layers * model.dtype.itemsize
    return int(held * hit + rest + cache)


def filled_cache(model, static: bool, batch: int, context: int, room: int):
    """A cache of `context` random tokens a sequence."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + room) if static else DynamicCache(config=config)
    if isinstance(model, HfMoeForCausalLM):
        grow_in_place(cache)  # as its `generate` does
    for layer in range(config.num_hidden_layers):
        shape = (batch, 1, context)
        latent = torch.randn(*shape, config.kv_lora_rank, device=model.device, dtype=model.dtype)
        k_rot = torch.randn(*shape, config.qk_rope_head_dim, device=model.device, dtype=model.dtype)
        cache.update(latent, k_rot, layer)
    return cache


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(name: str, model, batch: int, context: int, steps: int, device: str) -> dict:
    """Milliseconds a step, and memory above weights and cache, of one case; long calls are to take some 3 seconds."""
    room = steps + 9
    static = name != "transformers-dynamic" and (device == "cuda" or name != "hf_moe")
    ids = torch.randint(0, model.config.vocab_size, (batch, context + 1), device=device)

    def seconds(new: int) -> float:
        cache = filled_cache(model, static, batch, context, room)
        wait(device)
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, do_sample=False
        )
        wait(device)
        return time.perf_counter() - begin

    first = seconds(8)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    short = min(seconds(8) for _ in range(2))
    a_step = max((seconds(24) - short) / 16, 1e-4)
    steps = max(16, min(steps, int(3.0 / a_step)))
    long = min(seconds(steps + 8) for _ in range(2))
    ms = (long - short) / steps * 1000
    row = {"ms_per_step": ms, "tokens_per_s": 1000 * batch / ms, "first_call_s": first}
    if device == "cuda":
        width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
        kept = batch * (context + room) * width * model.config.num_hidden_layers * model.dtype.itemsize
        kept += sum(p.nbytes for p in model.parameters())
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - kept) / 2**20
    return row


def cold_generate(model, device: str) -> dict:
    """Seconds of the first call for a prompt of 1,024 tokens and 16 new ones, whatever it compiles included."""
    ids = torch.randint(0, model.config.vocab_size, (1, 1024), device=device)
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    wait(device)
    return {"first_call_s": time.perf_counter() - begin}


def prefill(model, batch: int, length: int, device: str) -> dict:
    """Tokens a second of one pass over prompts, logits of the last token alone."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    times = []
    for _ in range(4):
        wait(device)
        begin = time.perf_counter()
        with torch.no_grad():
            model(ids, logits_to_keep=1, past_key_values=DynamicCache(config=model.config))
        wait(device)
        times.append(time.perf_counter() - begin)
    ms = min(times[1:]) * 1000
    return {"ms_per_step": ms, "tokens_per_s": 1000 * batch * length / ms, "first_call_s": times[0]}


def rows(arguments, models: dict, device: str, label: str) -> Iterator[dict]:
    cases = [tuple(int(n) for n in case.split("x")) for case in arguments.cases]
    prompts = [tuple(int(n) for n in case.split("x")) for case in arguments.prefill]
    for name in arguments.implementations:
        model = models[name]
        work = [("generate", 1, 1024)] + [("prefill", *p) for p in prompts] + [("decode", *c) for c in cases]
        for op, batch, context in work:
            if op != "decode" and name == "transformers-static":
                continue
            try:
                if op == "generate":
                    row = cold_generate(model, device)
                elif op == "prefill":
                    row = prefill(model, batch, context, device)
                else:
                    row = measure(name, model, batch, context, arguments.steps, device)
                    needed = floor_bytes(model, batch, context)
                    row["gb_per_s"] = needed / row["ms_per_step"] / 1e6
                    if label in BYTES_PER_S:
                        row["floor_ms"] = needed / BYTES_PER_S[label] * 1000
            except (RuntimeError, torch.OutOfMemoryError):
                traceback.print_exc()
                continue
            finally:
                if device == "cuda":
                    torch.cuda.empty_cache()
            yield {"op": op, "impl": name, "batch": batch, "context": context, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="v2-lite")
    parser.add_argument("--cases", nargs="*", default=CASES.split())
    parser.add_argument("--prefill", nargs="*", default=["4x4096"])
    parser.add_argument("--implementations", nargs="*", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS[:2]))
    parser.add_argument("--steps", type=int, default=256, help="at most, in a long call")
    parser.add_argument("--commit", help="of the code that runs; what git says where it is left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    # In float32: in bfloat16 a near tie between two experts falls either way, and random models are full of them.
    error = difference(build("small", device, torch.float32), device)
    print(f"{gpu}: logits of a small model differ by {error:.2e} of the largest, in float32", flush=True)
    if error > 1e-4:
        raise SystemExit("the models disagree, so nothing is timed")
    models = build(arguments.size, device, dtype)
    known = {"h100", "h200", "a100", "cpu"} & set(gpu.lower().replace("-", " ").split())
    label = known.pop() if known else gpu.lower().replace(" ", "-")
    path = arguments.out / f"decode-{label}.json"
    result = {"device": gpu, "versions": versions(), "commit": arguments.commit or commit(), "size": arguments.size}
    if device == "cpu":
        result["threads"] = torch.get_num_threads()
    result["rows"] = []
    for row in rows(arguments, models, device, label):
        result["rows"].append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
