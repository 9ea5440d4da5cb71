"""How much quality a smaller cache costs: our compression and four baselines on SmolLM2-135M, before any training.

    python examples/continued/prepare_text.py .data                             # once: real text, Debian's manuals
    python examples/latent/compare.py --text .data --device cuda                # learns from 64k, measures on 100k
    python examples/latent/compare.py --text .data --learn 4096 --measure 2048 --context 512    # on a CPU

Learnt from the end of the training text, measured on held-out documents. Methods:

    ours         rotation across key heads, sizes of each layer by the budget, output projections fitted
    weights      truncated SVD of the keys' and values' weights; rotary pairs of the largest weights; layers alike
    activations  truncated SVD weighted by the activations' covariance, without rotation; layers alike
    uniform      ours with the same sizes in every layer
    unrotated    ours without rotation across heads

Writes results.json (rows of earlier healing keep their figures), curve.png and the ledgers of ours into ledger.json.
"""

import argparse
import json
import lzma
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hf_moe.demo.run import packaged_checkpoint
from hf_moe.upcycling import Options, open_source
from hf_moe.upcycling.budget import Candidate, allocate, uniform
from hf_moe.upcycling.compression import Builder, Survey, Text, survey
from hf_moe.upcycling.factors import latent_rows
from hf_moe.upcycling.families import family_of
from hf_moe.upcycling.layerwise import DenseLayers, Passage
from hf_moe.upcycling.layout import exact_config
from hf_moe.upcycling.source_attention import SourceAttention
from hf_moe.upcycling.statistics import Statistics
from hf_moe.upcycling.widths import limits_of

HERE = Path(__file__).parent
RATIOS = (0.75, 0.5, 0.375, 0.25)
METHODS = ("ours", "uniform", "unrotated", "activations", "weights")
# Share of the cache at which the damage of single layers is measured.
PROBED = 0.375


class Held:
    """A source whose tensors are read once and stay on the device."""

    def __init__(self, source: Any, device: torch.device):
        self.source, self.device = source, device
        self.tensors: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self.tensors:
            self.tensors[name] = self.source.read(name).to(self.device)
        return self.tensors[name][start:stop]


class Plain(Survey):
    """A survey whose latents come from weights alone, or from activations without a metric."""

    def statistics(self, layer: int, device: torch.device) -> Statistics:
        found = super().statistics(layer, device)
        rows = latent_rows(self.source.heads, self.source.weights(layer), found)[:, :-1]
        eye, pairs = torch.eye(len(rows), dtype=rows.dtype, device=device), len(found.without_rope_J)
        if self.by_weights:
            energy = rows[: 2 * pairs].square().sum(1).unflatten(0, (-1, 2)).sum(1)
            moments, turn = rows @ rows.T, torch.ones_like(found.turn_HJ)
            return replace(
                found,
                covariance_YY=moments,
                metric_YY=eye,
                without_rope_J=energy,
                turn_HJ=turn,
                mean_Y=found.mean_Y * 0,
            )
        # Keys and values alike: each part's error over its energy.
        energy = found.covariance_YY.diagonal()
        scale = torch.cat(
            [1 / part.sum().expand(len(part)) for part in (energy[: 2 * pairs], energy[2 * pairs :]) if len(part)]
        )
        return replace(found, metric_YY=torch.diag(scale))

    def __init__(self, found: Survey, source: SourceAttention, by_weights: bool):
        super().__init__(found.candidates, found.folder)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "by_weights", by_weights)


def tokens(path: Path, count: int, context: int, from_end: bool) -> torch.Tensor:
    with lzma.open(path) as file:
        ids = np.load(file)
    count = max(1, count // context) * context
    if len(ids) < count:
        raise ValueError(f"{path} has {len(ids)} tokens, {count} are needed")
    part = ids[-count:] if from_end else ids[:count]
    return torch.from_numpy(part.astype(np.int64)).view(-1, context)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for method in METHODS:
        own = sorted((row["ratio"], row["kl"], row["ppl"]) for row in rows if row["method"] == method)
        for panel, column in zip(panels, (1, 2), strict=True):
            panel.plot([100 * row[0] for row in own], [row[column] for row in own], "o-", label=method)
    healed = sorted((row["ratio"], row["ppl_healed"]) for row in rows if row["ppl_healed"])
    if healed:
        panels[1].plot([100 * row[0] for row in healed], [row[1] for row in healed], "k*--", label="ours, healed")
    panels[1].axhline(rows[0]["ppl_source"], color="grey", linewidth=1, label="source")
    for panel, name in zip(panels, ("KL from the source, nats a token", "perplexity"), strict=True):
        panel.set(xlabel="cache, % of the source's", ylabel=name, yscale="log")
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    figure.suptitle("SmolLM2-135M with a smaller cache", fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=Path(".data"), help="folder with train.npy.xz and heldout.npy.xz")
    add("--source", type=Path, help="dense model; the packaged SmolLM2-135M-Instruct by default")
    add("--learn", type=int, default=65_536, help="tokens to learn from")
    add("--measure", type=int, default=102_400, help="tokens to measure on")
    add("--context", type=int, default=1024, help="tokens in a row")
    add("--methods", nargs="+", default=METHODS, choices=METHODS)
    add("--ratios", type=float, nargs="+", default=RATIOS)
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--commit", default="", help="of the code, for the record")
    add("--output", type=Path, default=HERE)
    options = parser.parse_args()
    start, device = time.monotonic(), torch.device(options.device)

    opened = open_source(options.source or packaged_checkpoint())
    held, family = Held(opened, device), family_of(opened.config)
    fields = exact_config(opened, Options(experts=1))
    limits = limits_of(fields, family.model_type)

    def source() -> SourceAttention:
        return SourceAttention(DenseLayers(held, device), family, fields, limits, 1.0)

    ids = torch.cat(
        [
            tokens(options.text / "train.npy.xz", options.learn, options.context, from_end=True),
            tokens(options.text / "heldout.npy.xz", options.measure, options.context, from_end=False),
        ]
    )
    text = Text(ids, max(1, options.measure // options.context))

    def say(*words: Any) -> None:
        print(f"[{time.monotonic() - start:6.1f} s]", *words, flush=True)

    path = options.output / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    ledgers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        surveys: dict[bool, Survey] = {}

        def surveyed(rotate: bool) -> Survey:
            if rotate not in surveys:
                moments = Path(folder) / str(rotate)
                moments.mkdir()
                numbers = PROBED * limits.numbers
                surveys[rotate] = survey(source(), text, numbers, options.seed, moments, lambda _: None, rotate)
                say("surveyed", "with rotation" if rotate else "without rotation")
            return surveys[rotate]

        def sizes(found: Survey, ratio: float, same: bool) -> list[Candidate]:
            if same:
                return uniform(found.candidates, int(ratio * limits.numbers))
            return allocate(found.candidates, int(ratio * limits.numbers * limits.layers))

        for method in options.methods:
            found = surveyed(method in ("ours", "uniform"))
            plain, attention = method in ("weights", "activations"), source()
            used = Plain(found, attention, method == "weights") if plain else found
            builders = []
            for ratio in options.ratios:
                chosen = sizes(found, ratio, same=method not in ("ours", "unrotated"))
                builders.append(Builder(attention, used, chosen, text, lambda *_: None, fit=not plain))

            def visit(passage: Passage, builders: list[Builder] = builders) -> None:
                for builder in builders:
                    builder.visit(passage)

            final = attention.dense.run(text.ids, visit, lambda _: None)
            for ratio, builder in zip(options.ratios, builders, strict=True):
                built = builder.result(final)
                old = next((r for r in rows if (r["ratio"], r["method"]) == (ratio, method)), {})
                row = {"ratio": ratio, "method": method, **{k: round(v, 5) for k, v in built.model.items()}}
                row |= {name: old.get(name) for name in ("ppl_healed", "heal_tokens")}
                rows = [r for r in rows if r is not old] + [row]
                say(row)
                if method == "ours":
                    ledgers[str(ratio)] = built.layers
                rows.sort(key=lambda r: (-r["ratio"], METHODS.index(r["method"])))
                path.write_text(json.dumps(rows, indent=1) + "\n")
    setup = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "commit": options.commit,
        "seed": options.seed,
        "context": options.context,
        "tokens_learnt": text.ids[text.learnt].numel(),
        "tokens_measured": text.ids[text.measured].numel(),
        "seconds": round(time.monotonic() - start, 1),
    }
    if ledgers:
        (options.output / "ledger.json").write_text(json.dumps({"setup": setup, "layers": ledgers}, indent=1) + "\n")
    draw(rows, options.output / "curve.png")
    say(setup)


if __name__ == "__main__":
    main()
