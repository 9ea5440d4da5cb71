"""Attention compressed in two passes over calibration text, with one layer of the source in memory.

1. `survey`: moments of each layer; what every size of it would cost; and, since these costs are in units of the layer's
   own output, the KL that the whole model loses by this layer alone at one size, which sets their scale.
2. `build`: with sizes dealt out, each layer is made in closed form, and its output projection fitted to what the source
   puts out there, given what the layers before, compressed already, put in.

Letters: B sequences, S tokens of one, D hidden, H heads, V value width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .agreement import agreement, divergences
from .budget import Candidate
from .compressed_layer import Layer, make_layer, with_bottleneck
from .factors import Weights, candidates, latent_rows, query_rows, refit
from .layerwise import Passage
from .query_bottleneck import narrow, query_moments
from .random import Draws
from .source_attention import SourceAttention, before_output, rope_of, weights_at
from .statistics import Reader, Statistics, measure
from .widths import Width

# Towards the unfitted output projection; of the mean square of what it reads. Of 1e-4 and 1e-2, measured, the better.
_RIDGE = 1e-2
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
            probes[i] = passage.output(probe)
        last = passage.hidden[-1]
        probes.append(passage.output(last, lambda x: student.o_proj(before_output(student, x, rope, mask))))

    final = source.dense.run(text.ids, visit, advance)[-1]
    scaled = []
    for kl, reference, layer in zip(divergences(source.dense, final, probes), references, found, strict=True):
        # In float32 a layer that loses nothing may measure nothing, or less.
        scale = max(kl, 1e-9) / reference.damage if reference.damage > 0 else 1.0
        scaled.append([replace(candidate, damage=candidate.damage * scale) for candidate in layer])
    return Survey(scaled, folder)


def _measure(
    source: SourceAttention, passage: Passage, weights: Weights, text: Text, seed: int, rotate: bool
) -> Statistics:
    exact = source.exact(passage.number, weights)
    rope, mask = rope_of(passage), passage.arguments.get("attention_mask")
    cos, sin = (table[0, :, : table.shape[-1] // 2] for table in rope)
    plain = [rows.float() for rows in (weights.query, weights.key, weights.value)]
    output = weights.output[:, :-1].float()
    directions = Draws(f"{seed}/{passage.number}/probe")

    def project(b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x = passage.attention_input(passage.hidden[b])[0]
        noise = directions.draw(b, x.shape).to(x.device)
        query, key, value = (x @ rows[:, :-1].T + rows[:, -1] for rows in plain)
        return query, key, value, noise @ output

    def attend(b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return weights_at(exact, passage.attention_input(passage.hidden[b]), rope, mask)

    reader = Reader(len(passage.hidden) - text.held_out, project, attend, torch.complex(cos, sin))
    return measure(source.heads, reader, rotate)


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
    seed: int = 0,
) -> Built:
    """The second pass.

    Args:
        sizes: one for each layer. keep: is given each layer's tensors.
    Cost: two forward passes over the text.
    """
    builder = Builder(source, found, sizes, text, keep, seed=seed)
    return builder.result(source.dense.run(text.ids, builder.visit, advance))


class Builder:
    """One compressed model in the making, layer by layer beside the source; several may share its pass."""

    narrow = staticmethod(narrow)

    def __init__(
        self,
        source: SourceAttention,
        found: Survey,
        sizes: list[Candidate],
        text: Text,
        keep: Callable[[int, dict[str, torch.Tensor]], None],
        fit: bool = True,
        seed: int = 0,
    ):
        self.source, self.found, self.sizes, self.text, self.keep = source, found, sizes, text, keep
        self.fit, self.seed = fit, seed
        self.widths: list[Width] = []
        self.rows: list[dict[str, Any]] = []
        self.stream: list[torch.Tensor] = []

    def visit(self, passage: Passage) -> None:
        """Make the next layer and pass the text through it."""
        source, layer, size = self.source, passage.number, self.sizes[passage.number]
        weights = source.weights(layer)
        statistics = self.found.statistics(layer, source.dense.device)
        made = make_layer(source, layer, weights, statistics, size)
        if not self.stream:
            self.stream = list(passage.hidden)
        rope, mask = rope_of(passage, made.width.frequencies), passage.arguments.get("attention_mask")

        if (rank := source.fields.get("q_lora_rank")) is not None:
            eye = torch.eye(len(weights.query), dtype=torch.float64, device=source.dense.device)
            rows = query_rows(source.heads, statistics, made.kept, eye)
            inputs = (passage.attention_input(own) for own in self.stream[self.text.learnt])
            name = f"{self.seed}/{layer}/query"
            moments = query_moments(made.attention, rows, inputs, rope, mask, name)
            queries = self.narrow(weights.query, *moments, rank)
            made = with_bottleneck(source, layer, weights, statistics, made, queries)

        def read(x: torch.Tensor) -> torch.Tensor:
            return before_output(made.attention, x, rope, mask)

        if self.fit:
            made.tensors["o_proj"] = fitted(made.tensors["o_proj"], self._examples(passage, read))
        weight, bias = made.tensors["o_proj"].float().split([len(made.tensors["o_proj"][0]) - 1, 1], dim=1)

        def attention(x: torch.Tensor) -> torch.Tensor:
            return read(x) @ weight.T + bias[:, 0]

        errors = _Errors(source, passage, weights, statistics, made)
        for b, own in enumerate(self.stream):
            if b >= self.text.learnt.stop:
                errors.add(passage.hidden[b], attention(passage.attention_input(own)))
            self.stream[b] = passage.output(own, attention)
        self.rows.append(_ledger_row(statistics, size, made, layer) | errors.relative())
        self.keep(layer, made.tensors)
        self.widths.append(made.width)

    def _examples(
        self, passage: Passage, read: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the output projection reads and should put out, sequence by sequence."""
        for own, theirs in zip(self.stream[self.text.learnt], passage.hidden[self.text.learnt], strict=True):
            wanted = passage.attention_output(passage.attention_input(theirs))
            if self.source.adds:
                # What the layers before left out can be made up for here.
                wanted = wanted + (theirs - own) / self.source.multiplier
            yield read(passage.attention_input(own))[0], wanted[0]

    def result(self, final: list[torch.Tensor]) -> Built:
        """After the last layer, whose outputs in the source are given."""
        measured = self.text.measured
        ids = self.text.ids[measured].to(final[0].device)
        return Built(self.widths, self.rows, agreement(self.source.dense, final[measured], self.stream[measured], ids))


def fitted(output: torch.Tensor, examples: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """W_o and its bias (D, H·V + 1) that turn what is read (S, H·V) into what is wanted (S, D) as well as can be."""
    normal = output.new_zeros(output.shape[1], output.shape[1])
    right = output.new_zeros(output.shape[1], output.shape[0])
    for read, wanted in examples:
        a = torch.cat([read, read.new_ones(len(read), 1)], dim=1).double()
        normal += a.T @ a
        right += a.T @ (wanted.double() - a @ output.T)
    return refit(output, normal, right, _RIDGE)


class _Errors:
    """Squared errors of one layer, relative to what they are errors of, on the text that nothing was learnt from."""

    def __init__(
        self, source: SourceAttention, passage: Passage, weights: Weights, statistics: Statistics, made: Layer
    ):
        self.passage, self.latent, self.mean_Y = passage, made.latent, statistics.mean_Y
        self.queries, self.query = made.queries, weights.query
        self.rows, self.keys = latent_rows(source.heads, weights, statistics), 2 * len(statistics.without_rope_J)
        names = ("queries", "keys", "values", "output") if made.queries else ("keys", "values", "output")
        self.sums = {name: [0.0, 0.0] for name in names}

    def add(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Of one sequence: the layer's input in the source, and what the compressed attention puts out."""
        latent, x = self.latent, self.passage.attention_input(hidden)
        y = x[0].double() @ self.rows[:, :-1].T + self.rows[:, -1]
        error, exact = torch.zeros_like(y), self.passage.attention_output(x)
        centred = y[:, latent.index] - self.mean_Y[latent.index]
        error[:, latent.index] = centred - centred @ latent.project.T @ latent.expand.T
        compared = {
            "keys": (error[:, : self.keys], y[:, : self.keys]),
            "values": (error[:, self.keys :], y[:, self.keys :]),
            "output": (out - exact, exact),
        }
        if self.queries is not None:
            query = x[0].double() @ self.query[:, :-1].T + self.query[:, -1]
            compared["queries"] = (query - query @ self.queries.project.T @ self.queries.expand.T, query)
        for name, (wrong, whole) in compared.items():
            self.sums[name][0] += float(wrong.double().square().sum())
            self.sums[name][1] += float(whole.double().square().sum())

    def relative(self) -> dict[str, float]:
        """For the ledger."""
        return {f"measured_{name}": wrong / whole if whole else 0.0 for name, (wrong, whole) in self.sums.items()}


def _ledger_row(statistics: Statistics, size: Candidate, made: Layer, layer: int) -> dict[str, Any]:
    """Sizes and predictions of one layer."""
    frequencies = made.width.frequencies
    queries = {} if made.queries is None else {"predicted_query_tail": made.queries.tail}
    return queries | {
        "layer": layer,
        "cache_numbers": size.numbers,
        "latent": size.latent,
        "rotary_pairs": size.pairs,
        "frequencies": None if frequencies is None else list(frequencies),
        "predicted_kl": size.damage,
        "predicted_tail": made.latent.tail,
        "predicted_without_rope": float(statistics.without_rope_J.sum() - statistics.without_rope_J[made.kept].sum()),
    }
