"""One compressed layer from its statistics: what it keeps, its tensors, and the module that they make."""

from dataclasses import dataclass, replace

import torch

from ..model.attention_hf_moe import HfMoeAttention
from .budget import Candidate
from .factors import Latent, Weights, by_loss, compress_layer, factor, query_rows
from .query_bottleneck import Bottleneck
from .source_attention import SourceAttention
from .statistics import Statistics
from .widths import Width


@dataclass(frozen=True)
class Layer:
    """A compressed layer: the rotary pairs that it keeps, its latent, its tensors, and the module that they make.

    queries: their bottleneck, where they have one.
    """

    kept: torch.Tensor
    latent: Latent
    width: Width
    tensors: dict[str, torch.Tensor]
    attention: HfMoeAttention
    queries: Bottleneck | None = None


def make_layer(source: SourceAttention, layer: int, weights: Weights, statistics: Statistics, size: Candidate) -> Layer:
    """A layer of the given size."""
    kept = by_loss(statistics)[: size.pairs]
    latent = factor(statistics, kept, size.latent)
    tensors = compress_layer(source.heads, weights, statistics, kept, latent)
    frequencies = tuple((kept // source.limits.groups).tolist()) if source.limits.keys else None
    width = Width(size.latent, frequencies)
    return Layer(kept, latent, width, tensors, source.compressed(layer, width, tensors))


def with_bottleneck(
    source: SourceAttention, layer: int, weights: Weights, statistics: Statistics, made: Layer, queries: Bottleneck
) -> Layer:
    """The layer with its queries through a bottleneck."""
    tensors = {name: tensor for name, tensor in made.tensors.items() if name != "q_proj"}
    tensors["q_a_proj"] = queries.project @ weights.query
    tensors["q_b_proj"] = query_rows(source.heads, statistics, made.kept, queries.expand)
    attention = source.compressed(layer, made.width, tensors)
    return replace(made, tensors=tensors, attention=attention, queries=queries)
