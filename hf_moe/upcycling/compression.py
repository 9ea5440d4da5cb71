"""Attention compressed in two passes over calibration text, with one layer of the source in memory.

1. `survey`: moments of each layer; what every size of it would cost; and, since these costs are in units of the layer's
   own output, the KL that the whole model loses by this layer alone at one size, which sets their scale.
2. `build`: with sizes dealt out, each layer is made in closed form, and its output projection fitted to what the source
   puts out there, given what the layers before, compressed already, put in.

Letters: B sequences, S tokens of one, D hidden, H heads, V value width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..model.attention_hf_moe import HfMoeAttention
from .budget import Candidate
from .factors import Latent, Weights, by_loss, candidates, compress_layer, factor, latent_rows, refit
from .layerwise import Passage
from .random import generator
from .source_attention import SourceAttention, before_output, rope_of, weights_at
from .statistics import Statistics, measure
from .widths import Width

# Towards the unfitted output projection; of the mean square of what it reads. Of 1e-4 and 1e-2, measured, the better.
_RIDGE = 1e-2
_CHUNK = 512
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Text:
    """Rows of token ids (B, S), all of one length: the last `held_out` are measured on, the others are learnt from."""

    ids: torch.Tensor
    held_out: int

    @property
    def learnt(self) -> slice:
        """Rows to learn from."""
        return slice(0, len(self.ids) - self.held_out)

    @property
    def measured(self) -> slice:
        """Rows to measure on."""
        return slice(len(self.ids) - self.held_out, len(self.ids))


@dataclass(frozen=True)
class Survey:
    """What the first pass found. candidates: of each layer, damages in nats of the model's KL. folder: the moments."""

    candidates: list[list[Candidate]]
    folder: Path

    def statistics(self, layer: int, device: torch.device) -> Statistics:
        """The moments of a layer."""
        stored: Statistics = torch.load(self.folder / f"{layer}.pt", map_location=device, weights_only=False)
        return stored


def survey(
    source: SourceAttention,
    text: Text,
    numbers: float,
    seed: int,
    folder: Path,
    advance: Advance,
    rotate: bool = True,
    pairs: int | None = None,
) -> Survey:
    """The first pass.

    Args:
        numbers: cached numbers a token and layer at which a layer's damage to the model is measured.
        folder: for the moments of the layers. rotate: False leaves each key head by itself. pairs: a number of rotary
            pairs that must be among the candidates.
    Cost: a forward pass over the text, 12·B·S²·H·(pairs) FLOPs a layer, and half a pass over one row for each layer.
    """
    found: list[list[Candidate]] = []
    references: list[Candidate] = []
    probes: list[torch.Tensor] = []
    last = slice(len(text.ids) - 1, len(text.ids))
    final: list[torch.Tensor] = []

    def visit(passage: Passage) -> None:
        layer, weights = passage.number, source.weights(passage.number)
        statistics = _measure(source, passage, weights, text, seed, rotate)
        torch.save(statistics, folder / f"{layer}.pt")
        found.append(candidates(statistics, source.limits.fixed, pairs))
        affordable = [c for c in found[-1] if c.numbers <= max(numbers, source.limits.least)]
        references.append(min(affordable, key=lambda c: c.damage))
        made = make_layer(source, layer, weights, statistics, references[-1])
        student = made.attention
        rope, mask = rope_of(passage, made.width.frequencies), passage.arguments.get("attention_mask")
        for i, probe in enumerate(probes):
            probes[i] = passage.again(probe)
        alone = passage.again(passage.hidden[last], lambda x: student.o_proj(before_output(student, x, rope, mask)))
        probes.append(alone)
        final[:] = [passage.output[last]]

    source.dense.run(text.ids, visit, advance)
    scaled = []
    for probe, reference, layer in zip(probes, references, found, strict=True):
        # In float32 a layer that loses nothing may measure nothing, or less.
        kl = max(agreement(source, final[0], probe)["kl"], 1e-9)
        scale = kl / reference.damage if reference.damage > 0 else 1.0
        scaled.append([replace(candidate, damage=candidate.damage * scale) for candidate in layer])
    return Survey(scaled, folder)


def _measure(
    source: SourceAttention, passage: Passage, weights: Weights, text: Text, seed: int, rotate: bool
) -> Statistics:
    exact = source.exact(passage.number, weights)
    x = passage.attention_input[text.learnt]
    rope, mask = rope_of(passage), passage.arguments.get("attention_mask")
    noise = torch.randn(x.shape, generator=generator(f"{seed}/{passage.number}/probe")).to(x.device)
    cos, sin = (table[0, :, : table.shape[-1] // 2] for table in rope)

    def attend(b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return weights_at(exact, x[b : b + 1], rope, mask)

    query, key, value = (
        x @ rows[:, :-1].float().T + rows[:, -1].float() for rows in (weights.query, weights.key, weights.value)
    )
    back = noise @ weights.output[:, :-1].float()
    return measure(source.heads, query, key, value, back, torch.complex(cos, sin), attend, rotate)


@dataclass(frozen=True)
class Layer:
    """A compressed layer: the rotary pairs that it keeps, its latent, its tensors, and the module that they make."""

    kept: torch.Tensor
    latent: Latent
    width: Width
    tensors: dict[str, torch.Tensor]
    attention: HfMoeAttention


def make_layer(source: SourceAttention, layer: int, weights: Weights, statistics: Statistics, size: Candidate) -> Layer:
    """A layer of the given size."""
    kept = by_loss(statistics)[: size.pairs]
    latent = factor(statistics, kept, size.latent)
    tensors = compress_layer(source.heads, weights, statistics, kept, latent)
    frequencies = tuple((kept // source.limits.groups).tolist()) if source.limits.keys else None
    width = Width(size.latent, frequencies)
    return Layer(kept, latent, width, tensors, source.compressed(layer, width, tensors))


@dataclass(frozen=True)
class Built:
    """What the second pass made. layers: a ledger's row for each. model: how far the whole is from the source."""

    widths: list[Width]
    layers: list[dict[str, Any]]
    model: dict[str, float]


def build(
    source: SourceAttention,
    found: Survey,
    sizes: list[Candidate],
    text: Text,
    keep: Callable[[int, dict[str, torch.Tensor]], None],
    advance: Advance,
) -> Built:
    """The second pass.

    Args:
        sizes: one for each layer. keep: is given each layer's tensors.
    Cost: two forward passes over the text.
    """
    builder = Builder(source, found, sizes, text, keep)
    source.dense.run(text.ids, builder.visit, advance)
    return builder.result()


class Builder:
    """One compressed model in the making, layer by layer beside the source; several may share its pass."""

    def __init__(
        self,
        source: SourceAttention,
        found: Survey,
        sizes: list[Candidate],
        text: Text,
        keep: Callable[[int, dict[str, torch.Tensor]], None],
        fit: bool = True,
    ):
        self.source, self.found, self.sizes, self.text, self.keep, self.fit = source, found, sizes, text, keep, fit
        self.widths: list[Width] = []
        self.rows: list[dict[str, Any]] = []
        self.stream: torch.Tensor | None = None
        self.exact: torch.Tensor | None = None

    def visit(self, passage: Passage) -> None:
        """Make the next layer and pass the text through it."""
        source, text, layer, size = self.source, self.text, passage.number, self.sizes[passage.number]
        weights = source.weights(layer)
        statistics = self.found.statistics(layer, source.dense.device)
        made = make_layer(source, layer, weights, statistics, size)
        tensors, width = made.tensors, made.width
        rope, mask = rope_of(passage, width.frequencies), passage.arguments.get("attention_mask")
        hidden = passage.hidden if self.stream is None else self.stream
        wanted = passage.attention_output
        if source.adds:
            # What the layers before left out can be made up for here.
            wanted = wanted + (passage.hidden - hidden) / source.multiplier

        def attention(x: torch.Tensor) -> torch.Tensor:
            read = before_output(made.attention, x, rope, mask)
            if self.fit:
                tensors["o_proj"] = fitted(tensors["o_proj"], read[text.learnt], wanted[text.learnt])
            out = read @ tensors["o_proj"][:, :-1].float().T + tensors["o_proj"][:, -1].float()
            self.rows.append(_ledger_row(source, passage, weights, statistics, size, made, out, text))
            return out

        self.stream = passage.again(hidden, attention)
        self.keep(layer, tensors)
        self.widths.append(width)
        self.exact = passage.output[text.measured]

    def result(self) -> Built:
        """After the last layer."""
        assert self.stream is not None
        assert self.exact is not None
        own, measured = self.stream[self.text.measured], self.text.ids[self.text.measured]
        return Built(self.widths, self.rows, agreement(self.source, self.exact, own, measured.to(own.device)))


def fitted(output: torch.Tensor, read: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """W_o and its bias (D, H·V + 1) that turn `read` (B, S, H·V) into `wanted` (B, S, D) as well as can be."""
    normal = output.new_zeros(output.shape[1], output.shape[1])
    right = output.new_zeros(output.shape[1], output.shape[0])
    for some, goal in zip(read.flatten(0, 1).split(8192), wanted.flatten(0, 1).split(8192), strict=True):
        a = torch.cat([some, some.new_ones(len(some), 1)], dim=1).double()
        normal += a.T @ a
        right += a.T @ (goal.double() - a @ output.T)
    return refit(output, normal, right, _RIDGE)


def _ledger_row(
    source: SourceAttention,
    passage: Passage,
    weights: Weights,
    statistics: Statistics,
    size: Candidate,
    made: Layer,
    out: torch.Tensor,
    text: Text,
) -> dict[str, Any]:
    """Sizes and errors of one layer: relative squared errors on the text that nothing was learnt from."""
    kept, latent, frequencies = made.kept, made.latent, made.width.frequencies
    rows = latent_rows(source.heads, weights, statistics)
    x = passage.attention_input[text.measured].flatten(0, 1).double()
    y = x @ rows[:, :-1].T + rows[:, -1]
    error = torch.zeros_like(y)
    centred = y[:, latent.index] - statistics.mean_Y[latent.index]
    error[:, latent.index] = centred - centred @ latent.project.T @ latent.expand.T
    keys = 2 * len(statistics.without_rope_J)
    exact = passage.attention_output[text.measured]
    return {
        "layer": passage.number,
        "cache_numbers": size.numbers,
        "latent": size.latent,
        "rotary_pairs": size.pairs,
        "frequencies": None if frequencies is None else list(frequencies),
        "predicted_kl": size.damage,
        "predicted_tail": latent.tail,
        "predicted_without_rope": float(statistics.without_rope_J.sum() - statistics.without_rope_J[kept].sum()),
        "measured_keys": _relative(error[:, :keys], y[:, :keys]),
        "measured_values": _relative(error[:, keys:], y[:, keys:]),
        "measured_output": _relative(out[text.measured] - exact, exact),
    }


def _relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    return float(error.square().sum() / whole.square().sum()) if whole.numel() else 0.0


def agreement(
    source: SourceAttention, exact: torch.Tensor, other: torch.Tensor, ids: torch.Tensor | None = None
) -> dict[str, float]:
    """KL from the source in nats a token, share of equal likeliest tokens, and with ids both perplexities.

    Args:
        exact, other: the last layer's outputs (B, S, D).
    """
    kl = top1 = 0.0
    losses = [0.0, 0.0]
    for b in range(len(exact)):
        for start in range(0, exact.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            p, q = (source.dense.log_probabilities(hidden[b, part]) for hidden in (exact, other))
            kl += float((p.exp() * (p - q)).sum())
            top1 += float((p.argmax(-1) == q.argmax(-1)).sum())
            if ids is not None:
                following = ids[b, start + 1 : start + 1 + _CHUNK, None]
                for i, each in enumerate((p, q)):
                    losses[i] -= float(each[: len(following)].gather(-1, following).sum())
    tokens = exact.shape[0] * exact.shape[1]
    found = {"kl": kl / tokens, "top1": top1 / tokens}
    if ids is not None:
        predicted = ids.shape[0] * (ids.shape[1] - 1)
        ppl_source, ppl = (float(torch.tensor(loss / predicted).exp()) for loss in losses)
        found |= {"ppl": ppl, "ppl_source": ppl_source}
    return found
