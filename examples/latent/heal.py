"""Heal SmolLM2-135M with a compressed cache, and enter its perplexity into the table of the compression.

    python examples/continued/prepare_text.py .data        # once: real text, from Debian's manuals
    python examples/latent/heal.py --text .data            # cache ratios 0.5 and 0.25, one GPU, 3 minutes each

Each ratio is compressed with `upcycle`'s own calibration text, trained towards the source's distribution on manuals
and measured on others. Rows go into results.json, curves and settings into healed.json; those of other ratios stay.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_moe.demo.run import packaged_checkpoint
from hf_moe.upcycling import heal, upcycle

HERE = Path(__file__).parent


def enter(path: Path, ratio: float, record: dict[str, Any]) -> dict[str, Any]:
    """Complete the row of our method at a ratio, or make it, and return it."""
    rows = json.loads(path.read_text()) if path.exists() else []
    row = next((row for row in rows if row["method"] == "ours" and row["ratio"] == ratio), None)
    before, after = record["before"], record["after"]
    if row is None:
        row = {"ratio": ratio, "method": "ours", **{name: before[name] for name in ("kl", "top1", "ppl", "ppl_source")}}
        rows.append(row)
    # The table's perplexities are of one text; what healing gains is a ratio.
    row["ppl_healed"] = round(row["ppl_source"] * after["ppl"] / after["ppl_source"], 4)
    row["heal_tokens"] = record["settings"]["tokens"]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path(".data"), help="folder with train.npy.xz and heldout.npy.xz")
    add("--source", type=Path, help="dense model; the packaged SmolLM2-135M-Instruct by default")
    add("--ratios", type=float, nargs="+", default=[0.5, 0.25], help="of the cache")
    add("--models", type=Path, help="where compressed and healed folders are kept; a temporary folder by default")
    add("--output", type=Path, default=HERE, help="folder of results.json and healed.json")
    add("--train", default="all", choices=("attention", "all"))
    add("--tokens", type=int, default=30_000_000)
    add("--length", type=int, default=512)
    add("--batch", type=int, default=32)
    add("--learning-rate", type=float)
    add("--layer-weight", type=float, default=0.0)
    add("--calibration-tokens", type=int, default=65_536)
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    source = options.source or packaged_checkpoint()
    choices = {
        name: getattr(options, name)
        for name in ("train", "tokens", "length", "batch", "learning_rate", "layer_weight", "seed")
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    setup = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for ratio in options.ratios:
            compressed, healed = folder / f"compressed-{ratio}", folder / f"healed-{ratio}"
            if not compressed.exists():
                upcycle(
                    source,
                    compressed,
                    experts=1,
                    attention="compress",
                    cache_ratio=ratio,
                    calibration_tokens=options.calibration_tokens,
                )
            start = time.monotonic()
            record = heal(
                source,
                compressed,
                healed,
                [options.text / "train.npy.xz"],
                heldout=options.text / "heldout.npy.xz",
                save_steps=1_000_000,
                **choices,
            )
            seconds = round(time.monotonic() - start, 1)
            row = enter(options.output / "results.json", ratio, record)
            print(f"{ratio}: {seconds} s, {record['before']} -> {record['after']}; {row}", flush=True)
            path = options.output / "healed.json"
            runs = json.loads(path.read_text()) if path.exists() else {}
            record["settings"] = {
                **choices,
                "steps": record["settings"]["steps"],
                "learning_rate": record["settings"]["learning_rate"],
            }
            runs[str(ratio)] = {"setup": setup, "seconds": seconds, **record}
            path.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
