"""Which experts serve which tokens of a text: as a table in the terminal, and as a page to look through.

Letters: L sparse layers, T tokens, E experts, K experts a token.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .load import ExpertLoad, experts_in_all, experts_of


@dataclass(frozen=True)
class Choices:
    """The routing of one text.

    Attributes:
        tokens: T strings.
        index: (L, T, K) chosen experts, the heaviest first.
        weight: (L, T, K), each token's weights divided by their sum.
        experts: E.
    """

    tokens: list[str]
    index: torch.Tensor
    weight: torch.Tensor
    experts: int

    @property
    def load(self) -> ExpertLoad:
        """Counts (L, E)."""
        counts = [torch.bincount(layer.flatten(), minlength=self.experts) for layer in self.index]
        return ExpertLoad(torch.stack(counts))

    def favourites(self, layer: int, expert: int, most: int = 4) -> list[str]:
        """The tokens that an expert gets more often than by a chance of K/E, the largest surplus first."""
        surplus: dict[str, float] = {}
        chance = self.index.shape[2] / self.experts
        chosen = (self.index[layer] == expert).any(dim=1).tolist()
        for token, mine in zip(self.tokens, chosen, strict=True):
            surplus[token] = surplus.get(token, 0.0) + mine - chance
        return [token for token in sorted(surplus, key=lambda t: -surplus[t])[:most] if surplus[token] > 0]


@torch.no_grad()
def expert_choices(model: nn.Module, tokens: list[str], ids: torch.Tensor) -> Choices:
    """Run a text of T tokens and note what every layer's router chose.

    Args:
        model: this package's or any mixture of Transformers'; its mode (training, evaluation) is left as it is.
        tokens: T strings. ids: (1, T).
    Raises:
        ValueError: the model has no experts.
    """
    modules, seen = experts_of(model), []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        weight = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]
        weight, order = weight.float().sort(dim=-1, descending=True)
        seen.append((index.gather(1, order).cpu(), (weight / weight.sum(dim=-1, keepdim=True)).cpu()))

    handles = [m.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for m in modules.values()]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    index, weight = (torch.stack(part) for part in zip(*seen, strict=True))
    return Choices(tokens, index, weight, experts_in_all(next(iter(modules.values()))))


def inspect(folder: str, text: str, most_tokens: int = 1024) -> Choices:
    """Load a model with its tokenizer and route a text through it.

    Raises:
        ValueError: no experts, or a text of no token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=most_tokens)["input_ids"]
    if not ids.shape[1]:
        raise ValueError(f"the text has {len(text)} characters and no token")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    return expert_choices(model, tokens, ids.to(model.device))


def show(choices: Choices, console: Any) -> None:
    """Print a row a layer: how even it is, and its four busiest experts with their share and the tokens they favour."""
    from rich.table import Table
    from rich.text import Text

    load = choices.load
    layers = Table("layer", "busiest over mean", "unused", "entropy", "busiest experts and what they favour")
    for layer, share in enumerate(load.share):
        words = Text()
        for expert in share.argsort(descending=True)[:4].tolist():
            favourites = " ".join(repr(token)[1:-1] for token in choices.favourites(layer, expert))
            words.append(f"{expert}: ", style="bold").append(f"{share[expert]:.0%}  {favourites}\n")
        words.rstrip()
        layers.add_row(
            str(layer),
            f"{load.layer_max_over_mean[layer]:.2f}",
            f"{load.layer_unused[layer]:.0%}",
            f"{load.layer_entropy[layer]:.2f}",
            words,
        )
    console.print(layers)


def write_page(choices: Choices, path: Path) -> None:
    """One HTML file without anything from outside: the text, coloured by the heaviest expert of a layer to choose."""
    data = {
        "tokens": choices.tokens,
        "index": choices.index.tolist(),
        "weight": [[[round(w, 3) for w in row] for row in layer] for layer in choices.weight.tolist()],
        "experts": choices.experts,
    }
    # "</" would end the script that holds it, and "<!--" change how it is read.
    path.write_text(PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")


PAGE = """<!doctype html>
<meta charset="utf-8"><title>Which experts serve which tokens</title>
<style>
body { font: 16px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
#text { white-space: pre-wrap; font-family: ui-monospace, monospace; border-top: 1px solid #ccc; padding-top: 1rem }
#text span, #key span { border-radius: 3px; padding: 1px 0; color: #000 }
#key span { padding: 1px 6px; cursor: pointer }
.faded { opacity: .2 }
</style>
<h1>Which experts serve which tokens</h1>
<p><label>Sparse layer <input id="layer" type="range" min="0" value="0"> <output id="number"></output></label>
<p id="key"></p>
<p>A token has the colour of its heaviest expert; point at it for all, click an expert to see its own.</p>
<div id="text"></div>
<script>
const data = DATA;
const layer = document.getElementById("layer"), text = document.getElementById("text");
const key = document.getElementById("key");
layer.max = data.index.length - 1;
const colour = e => `hsl(${(e * 137.5) % 360} 70% ${72 + 12 * (Math.floor(e / 8) % 2)}%)`;
let only = null;
function draw() {
  const index = data.index[layer.value], weight = data.weight[layer.value], count = Array(data.experts).fill(0);
  document.getElementById("number").textContent = layer.value;
  text.replaceChildren(...data.tokens.map((token, t) => {
    const span = document.createElement("span");
    index[t].forEach(e => count[e]++);
    span.textContent = token;
    span.style.background = colour(index[t][0]);
    span.title = index[t].map((e, k) => `expert ${e}: ${Math.round(100 * weight[t][k])} %`).join("\\n");
    if (only !== null && !index[t].includes(only)) span.className = "faded";
    return span;
  }));
  key.replaceChildren(...count.map((n, e) => {
    const span = document.createElement("span");
    span.textContent = `${e}: ${Math.round(100 * n / (index.length * index[0].length))} %`;
    span.style.background = colour(e);
    if (only !== null && only !== e) span.className = "faded";
    span.onclick = () => { only = only === e ? null : e; draw(); };
    return span;
  }).flatMap(span => [span, " "]));
}
layer.oninput = draw;
draw();
</script>
"""
