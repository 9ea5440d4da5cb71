"""What each mode costs on a real model: `python conversion/compare_modes.py SOURCE WORK_FOLDER TABLE.md`.

Converts the source in every mode, verifies each on the same held-out text and writes one table. The converted models
stay in the work folder; a mode whose certificate is there already is not run again.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import torch
import transformers

from hf_moe.upcycling import upcycle, verify

MODES = {
    "copy, 4 experts, top 2": {"mode": "copy", "experts": 4, "top_k": 2},
    "split, 4 shards, 1 shared, 4 copies of the others": {
        "mode": "split",
        "shards": 4,
        "shared_shards": 1,
        "experts": 12,
        "top_k": 3,
    },
    "drop 0.5, 4 experts, top 2": {"mode": "drop", "experts": 4, "top_k": 2, "drop_ratio": 0.5},
    "drop 0.1, 4 experts, top 2": {"mode": "drop", "experts": 4, "top_k": 2, "drop_ratio": 0.1},
    "cluster, 7 experts and 1 shared, top 7": {"mode": "cluster", "experts": 7, "shared_shards": 1, "top_k": 7},
    "cluster, 7 experts and 1 shared, top 5": {"mode": "cluster", "experts": 7, "shared_shards": 1, "top_k": 5},
    "noise 0.05, 4 experts, top 2": {"mode": "noise", "experts": 4, "top_k": 2, "noise_std": 0.05},
}


def measure(source: str, work: Path, name: str, choices: dict) -> dict:
    """Certificate of one mode, from the work folder or made now."""
    target = work / "".join(c if c.isalnum() else "-" for c in name)
    if not (target / "certificate.json").is_file():
        if not target.is_dir():
            upcycle(source, target, **choices)
        verify(source, target)
    return json.loads((target / "certificate.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("work", type=Path)
    parser.add_argument("table", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    rows = []
    for name, choices in MODES.items():
        certificate = measure(arguments.source, arguments.work, name, choices)
        logits, loss = certificate["logits"], certificate["loss"]
        cells = [
            name,
            f"{math.exp(loss['source']):.3f}",
            f"{math.exp(loss['target']):.3f}",
            f"{loss['difference']:+.4f}",
            f"{logits['max_abs_difference']:.2e}",
            f"{logits['top1_agreement']:.2%}",
            "yes" if certificate["decode"]["greedy_equal"] else "no",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        f"# {certificate['source']} through every mode, before any training",
        "",
        f"Text: {logits['tokens']} tokens of {certificate['text']}. fp32, CPU, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, seed 0.",
        f"Command: `python conversion/compare_modes.py {Path(arguments.source).name} WORK {arguments.table.name}`.",
        "",
        "| mode | source's perplexity | target's | Δ loss | max Δlogit | same top 1 | same 64 greedy tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    arguments.table.parent.mkdir(parents=True, exist_ok=True)
    arguments.table.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
