"""Heal SmolLM2-135M with a compressed cache, and enter its perplexity into the table of the compression.

    python examples/latent/heal.py --tiny                  # seconds on a CPU: a random model, random ids
    python examples/continued/prepare_text.py .data        # once: real text, from Debian's manuals
    python examples/latent/heal.py --text .data            # cache ratios 0.5 and 0.25, one GPU, minutes

Compression learns from the end of the training text and healing from all of it; both are measured on other manuals, as
by compare.py. Rows go into results.json, curves and settings into healed.json; those of other ratios stay.
"""

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_moe.demo.run import packaged_checkpoint
from hf_moe.upcycling import heal, open_source, upcycle

HERE = Path(__file__).parent


def enter(path: Path, ratio: float, record: dict[str, Any]) -> dict[str, Any]:
    """Complete the row of our method at a ratio, or make it, and return it."""
    rows = json.loads(path.read_text()) if path.exists() else []
    row = next((row for row in rows if row["method"] == "ours" and row["ratio"] == ratio), None)
    before, after = record["before"], record["after"]
    if row is None:
        row = {"ratio": ratio, "method": "ours", **{name: before[name] for name in ("kl", "top1", "ppl", "ppl_source")}}
        rows.append(row)
    if abs(row["ppl_source"] / after["ppl_source"] - 1) > 1e-3:
        raise ValueError(
            f"the row's source has perplexity {row['ppl_source']}, here {after['ppl_source']}: it was measured on "
            "another text"
        )
    row["ppl_healed"], row["heal_tokens"] = round(after["ppl"], 4), record["settings"]["tokens"]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return row


def tiny(folder: Path) -> Path:
    """A random Llama and random ids, for a run of seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    for name, count in (("train", 10000), ("heldout", 400)):
        with lzma.open(folder / f"{name}.npy.xz", "wb") as file:
            np.save(file, np.random.default_rng(count).integers(1, 64, count).astype(np.uint16))
    return folder / "source"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="seconds on a CPU, with a random model")
    add("--text", type=Path, default=Path(".data"), help="folder with train.npy.xz and heldout.npy.xz")
    add("--source", type=Path, help="dense model; the packaged SmolLM2-135M-Instruct by default")
    add("--ratios", type=float, nargs="+", default=[0.5, 0.25], help="of the cache")
    add("--tokens", type=int, nargs="+", default=[10_000_000, 29_900_000], help="to read at each ratio")
    add("--learning-rate", type=float, nargs="+", default=[2e-4, 3e-4], help="at each ratio")
    add("--calibration-tokens", type=int, default=65536)
    add("--models", type=Path, help="where compressed and healed folders are kept; a temporary folder by default")
    add("--output", type=Path, default=HERE, help="folder of results.json and healed.json")
    add("--train", default="all", choices=("attention", "all"))
    add("--length", type=int, default=512)
    add("--batch", type=int, default=32)
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.tiny:
            options.text, options.length, options.batch = folder, 16, 4
            options.tokens, options.calibration_tokens = [2560] * len(options.ratios), 512
        source = tiny(folder) if options.tiny else options.source or packaged_checkpoint()
        for ratio, tokens, rate in zip(options.ratios, options.tokens, options.learning_rate, strict=True):
            run(ratio, tokens, rate, source, folder, options)


def calibration_text(source: Path, options: argparse.Namespace, path: Path) -> str:
    """A file with the end of the training text, somewhat longer than what is read of it."""
    if not path.exists():
        with lzma.open(options.text / "train.npy.xz") as file:
            ids = np.load(file)[-options.calibration_tokens * 5 // 4 :]
        tokenizer = AutoTokenizer.from_pretrained(**open_source(source).load_arguments())
        path.write_text(tokenizer.decode(ids.tolist()), encoding="utf-8")
    return str(path)


def run(ratio: float, tokens: int, rate: float, source: Path, folder: Path, options: argparse.Namespace) -> None:
    """Compress, heal and enter one ratio."""
    compressed, start = folder / f"compressed-{ratio}", time.monotonic()
    if not compressed.exists():
        calibration = {"calibration_tokens": options.calibration_tokens}
        if not options.tiny:
            calibration["calibration"] = (calibration_text(source, options, folder / "calibration.txt"),)
        upcycle(source, compressed, experts=1, attention="compress", cache_ratio=ratio, **calibration)
    choices = {name: getattr(options, name) for name in ("train", "length", "batch", "seed")}
    choices |= {"tokens": tokens, "learning_rate": rate}
    text, heldout = options.text / "train.npy.xz", options.text / "heldout.npy.xz"
    measured = {"heldout": heldout, "heldout_rows": 100, "heldout_length": options.length if options.tiny else 1024}
    # Few minutes: no checkpoint.
    record = heal(source, compressed, folder / f"healed-{ratio}", [text], save_steps=10**6, **measured, **choices)
    seconds = round(time.monotonic() - start, 1)
    row = enter(options.output / "results.json", ratio, record)
    print(f"{ratio}: {seconds} s, {record['before']} -> {record['after']}; {row}", flush=True)
    path = options.output / "healed.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    # Without the paths of this machine.
    settings = {name: record["settings"][name] for name in (*choices, "steps")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    setup = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    runs[str(ratio)] = {"setup": setup, "seconds": seconds, **record, "settings": settings}
    path.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
