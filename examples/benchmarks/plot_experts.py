"""Draw a result file of experts.py: one panel a shape, a bar for each implementation.

python examples/benchmarks/plot_experts.py examples/benchmarks/results/experts-h200.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "hf_moe_triton": "#d1495b",
    "sonicmoe": "#30638e",
    "grouped_mm": "#edae49",
    "liger": "#66a182",
    "scattermoe": "#8d96a3",
    "cublas_balanced": "#c9cba3",
}


def draw(result: dict, routing: str, direction: str, path: Path) -> None:
    rows = [r for r in result["rows"] if r["routing"] == routing and r["pass"] == direction]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    colors = {name: color for name, color in COLORS.items() if any(r["impl"] == name for r in rows)}
    figure, panels = plt.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 3.7), sharey=True, squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        tokens = sorted({r["tokens"] for r in rows if r["shape"] == shape})
        found = {(r["impl"], r["tokens"]): r["tflops"] for r in rows if r["shape"] == shape}
        width = 0.8 / len(colors)
        for i, (name, color) in enumerate(colors.items()):
            heights = [found.get((name, t), 0) for t in tokens]
            places = [x + (i + 0.5) * width - 0.4 for x in range(len(tokens))]
            panel.bar(places, heights, width, color=color, label=name)
        panel.axhline(result["ceilings"]["matmul_tflops"], color="black", linewidth=0.8, linestyle=":")
        panel.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens])
        panel.set_title(shape, fontsize=10)
        panel.set_xlabel("tokens")
    panels[0][0].set_ylabel("TFLOP/s")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=len(colors))
    figure.suptitle(
        f"{direction}, bf16, {routing} routing, {result['device']} (dotted: a large matrix product)", fontsize=11
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    for routing in ("uniform", "zipf"):
        for direction in ("forward", "forward+backward"):
            name = f"{args.result.stem}-{direction.replace('+', '-')}-{routing}.png"
            draw(result, routing, direction, args.result.with_name(name))


if __name__ == "__main__":
    main()
