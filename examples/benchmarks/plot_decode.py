"""Draw a result file of decode.py: tokens a second over the context at batch 1, and over the batch.

python examples/benchmarks/plot_decode.py examples/benchmarks/results/decode-h100.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMPLEMENTATIONS = {
    "hf_moe": ("hf_moe", "#d1495b", "o"),
    "transformers-static": ("Transformers, static cache, compiled", "#30638e", "s"),
    "transformers-dynamic": ("Transformers, by default", "#8d96a3", "^"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["op"] == "decode"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    for panel, key, keep in (
        (panels[0], "context", lambda row: row["batch"] == 1),
        (panels[1], "batch", lambda row: row["context"] == 4096),
    ):
        chosen = sorted(filter(keep, rows), key=lambda row: row[key])
        for name, (label, color, marker) in IMPLEMENTATIONS.items():
            points = [(row[key], row["tokens_per_s"]) for row in chosen if row["impl"] == name]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, color=color, label=label)
        limits = {row[key]: 1000 * row["batch"] / row["floor_ms"] for row in chosen if "floor_ms" in row}
        panel.plot(limits.keys(), limits.values(), "--", color="#bbbbbb", label="bytes read at 3.0 TB/s")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("cached tokens, batch 1" if key == "context" else "sequences of 4,096 tokens")
        panel.set_ylabel("tokens a second")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{result['size']}, bf16, {result['device']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
