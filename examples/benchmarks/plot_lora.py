"""Draw a result file of lora.py: time and memory beside peft's, for layers and for a step.

python examples/benchmarks/plot_lora.py examples/benchmarks/results/lora-h100.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMPLEMENTATIONS = {
    "hf_moe": ("LoRA on experts, hf_moe", "#d1495b"),
    "peft": ("LoRA on experts, peft", "#edae49"),
    "hf_moe_full": ("expert weights trained, hf_moe", "#30638e"),
    "hf_moe_attention": ("LoRA on attention, hf_moe", "#8d96a3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    result = json.loads(path.read_text())
    found = {(row["case"], row["impl"]): row for row in result["rows"]}
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    for panel, key, what in zip(panels, ("ms", "peak_mib"), ("ms", "peak, MiB"), strict=True):
        for i, (impl, (label, color)) in enumerate(IMPLEMENTATIONS.items()):
            bars = [(x, found[case, impl][key]) for x, case in enumerate(cases) if (case, impl) in found]
            panel.bar([x + (i - 1.5) * 0.2 for x, _ in bars], [h for _, h in bars], 0.2, color=color, label=label)
        names = [case.replace("-4-layers-", "\n4 layers, ").replace("-8192", "\n8,192") for case in cases]
        names = [name.replace("-compiled", "\ncompiled") for name in names]
        panel.set_xticks(range(len(cases)), [name.replace("-32768", "\n32,768") for name in names], fontsize=8)
        panel.set_ylabel(what)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=len(IMPLEMENTATIONS))
    figure.suptitle(f"forward and backward, rank 16, bf16, {result['device']}; first group: a step", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
