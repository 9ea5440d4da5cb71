"""Our attention in the terms of stock DeepseekV3: one rotary key, a norm behind every latent, no bias of queries.

    rotary keys   k_1 … k_G side by side are one key of G·U pairs, whose table repeats the frequencies; a query head is
                  zero outside its group's block, so that q · k = q_h · k_g(h)
    latent        [c ; K …] with constants K of the bias: the norm divides it by sqrt((|c|² + ΣK²) / C') = s (1 + ε),
                  ε = |c|² / (2 C' s²), and its weight is s: the latent comes out as it went in, but for ε
    query bias    [W_q x + b ; K …] is a bottleneck of the same kind, and its expansion puts the heads into their blocks
    scale         ratio of the scales: in the table's factor of cos and sin, squared by a score; else on the queries

A layer's pairs are a part of the U that any layer uses; what it lacks is zero. Pairs stand side by side, which every
engine rotates so.

Letters: D hidden, H heads, G key groups, C latent width, P rotary width, N position-free width, V value width, U pairs
of a group in the shared key.
Source: arXiv:2412.19437 for the target; the embedding is this project's.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .formats import union_of

# A norm's epsilon, which engines do not agree on, is nothing beside a latent that is so much larger.
CALIBRATED_SCALE = 64.0
# The norm's scale s: a power of two, so that dividing by it and multiplying rounds nothing away; ε is 2e-9 for
# latents of mean square 4.
NORM_SCALE = 2.0**15


@dataclass(frozen=True)
class Shape:
    """What a configuration of ours becomes.

    Attributes:
        groups, heads, nope, interleave: of ours.
        union: frequency of each of the U pairs.
        pairs: each layer's pairs as positions in `union`.
        ranks: each layer's latent width; latent: the uniform one, without constants.
        table: whether the frequencies have to be listed (`longrope`).
    """

    groups: int
    heads: int
    nope: int
    interleave: bool
    union: tuple[int, ...]
    pairs: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    latent: int
    table: bool

    @property
    def rotary(self) -> int:
        """Width of the shared key."""
        return 2 * self.groups * len(self.union)

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """That of an `HfMoeConfig`."""
        own = config.rope_frequencies or [list(range(config.qk_rope_head_dim // 2))] * config.num_hidden_layers
        union, by_layer = union_of(own), []
        for pairs in own:
            seen = Counter[int]()
            places = []
            for frequency in pairs:
                places.append(union.index(frequency) + seen[frequency])
                seen[frequency] += 1
            by_layer.append(tuple(places))
        whole = union == list(range(config.head_dim // 2))
        return cls(
            config.num_key_value_heads,
            config.num_attention_heads,
            config.qk_nope_head_dim,
            bool(config.rope_interleave),
            tuple(union),
            tuple(by_layer),
            tuple(config.latent_widths),
            max(config.latent_widths),
            config.num_key_value_heads > 1 or not whole,
        )


def own_rows(count: int, interleave: bool) -> list[int]:
    """Rows of `count` rotary pairs in a head of ours: pair by pair, its two numbers side by side."""
    if interleave:
        return list(range(2 * count))
    return [row for pair in range(count) for row in (pair, pair + count)]


def query_places(*, heads: int, groups: int, nope: int, pairs: list[int], union: int, interleave: bool) -> list[int]:
    """For every row of our queries its row in the stock ones (H · (N + 2·G·U))."""
    rows, width = own_rows(len(pairs), interleave), nope + 2 * groups * union
    places = []
    for head in range(heads):
        start, block = head * width, nope + 2 * union * (head * groups // heads)
        rotary = [0] * len(rows)
        for i, row in enumerate(rows):
            rotary[row] = start + block + 2 * pairs[i // 2] + i % 2
        places += [*range(start, start + nope), *rotary]
    return places


def latent_places(*, rank: int, latent: int, groups: int, pairs: list[int], union: int, interleave: bool) -> list[int]:
    """For every row of our latent and keys its row in the stock ones (C' + 2·G·U)."""
    rows = own_rows(len(pairs), interleave)
    places = list(range(rank))
    for group in range(groups):
        keys = [0] * len(rows)
        for i, row in enumerate(rows):
            keys[row] = latent + 2 * union * group + 2 * pairs[i // 2] + i % 2
        places += keys
    return places


def norm_constants(width: int, dtype: torch.dtype) -> list[float]:
    """Numbers K beside a latent of `width` such that sqrt(ΣK² / (width + how many)) is `NORM_SCALE` to fp32's rounding.

    One is enough where the dtype holds it; bfloat16 needs smaller ones for what it rounds away.

    Raises:
        ValueError: float16, which holds no such number.
    """
    if dtype == torch.float16:
        raise ValueError(
            "float16 has no room for the constant that carries a latent without norm through DeepseekV3's; convert "
            "the model to bfloat16 or float32 first"
        )
    for count in range(1, 9):
        total = rest = (width + count) * NORM_SCALE**2
        constants = []
        for _ in range(count):
            # Rounded down, so that the rest is none below zero.
            constant = torch.tensor(max(rest, 0.0), dtype=torch.float64).sqrt().mul(1 - 2.0**-24).to(dtype)
            if constant.double().square() > rest:
                constant = torch.nextafter(constant, torch.zeros((), dtype=dtype))
            constants.append(constant.item())
            rest -= constants[-1] ** 2
        if rest <= 2e-7 * total:
            return constants
    raise AssertionError(dtype)


def stock_query(weight: torch.Tensor, *, free_scale: float, scale: float, columns: int, **shape: Any) -> torch.Tensor:
    """Queries (H·(N + P), D) of ours as stock ones (H·(N + 2·G·U), `columns`), further columns zero.

    Args:
        scale: of all rows. free_scale: of the position-free ones, besides.
    """
    size = shape["heads"] * (shape["nope"] + 2 * shape["groups"] * shape["union"])
    result = weight.new_zeros(size, columns)
    result[query_places(**shape), : weight.shape[1]] = weight
    if scale != 1 or free_scale != 1:
        result = result.double() * scale
        result.unflatten(0, (shape["heads"], -1))[:, : shape["nope"]] *= free_scale
    return result


def own_query(weight: torch.Tensor, *, free_scale: float, scale: float, columns: int, **shape: Any) -> torch.Tensor:
    """The inverse of `stock_query`; `columns` are ours."""
    if scale != 1 or free_scale != 1:
        weight = weight.double() / scale
        weight.unflatten(0, (shape["heads"], -1))[:, : shape["nope"]] /= free_scale
    return weight[query_places(**shape), :columns]


def select_query(*, size: int, free_scale: float, scale: float, columns: int, **shape: Any) -> torch.Tensor:
    """The expansion of queries whose bottleneck holds them as they are: zeros and ones at their places."""
    return stock_query(torch.eye(size), free_scale=free_scale, scale=scale, columns=columns, **shape)


def stock_latent(weight: torch.Tensor, *, size: int, scale: float = 1.0, **shape: Any) -> torch.Tensor:
    """Rows of latent, times `scale`, and keys, or their bias, at their places among `size`; the others zero."""
    result = weight.new_zeros(size, *weight.shape[1:])
    result[latent_places(**shape)] = weight
    result[: shape["latent"]] *= scale
    return result


def own_latent(weight: torch.Tensor, **shape: Any) -> torch.Tensor:
    """The inverse of `stock_latent`."""
    return weight[latent_places(**shape)]


def latent_bias(
    *bias: torch.Tensor, size: int, constants: list[float], scale: float = 1.0, **shape: Any
) -> torch.Tensor:
    """Bias of latent and keys, ours where there is one, with the constants behind the latent."""
    result = stock_latent(bias[0], size=size, scale=scale, **shape) if bias else torch.zeros(size)
    result[shape["latent"] - len(constants) : shape["latent"]] = result.new_tensor(constants)
    return result


def append_rows(weight: torch.Tensor, *, values: list[float]) -> torch.Tensor:
    """Rows of one value each below a matrix or a vector."""
    return torch.cat(
        [weight, weight.new_tensor(values).view(-1, *[1] * (weight.dim() - 1)).expand(-1, *weight.shape[1:])]
    )


def pad_columns(weight: torch.Tensor, *, columns: int) -> torch.Tensor:
    """Columns of zeros up to so many."""
    return torch.nn.functional.pad(weight, (0, columns - weight.shape[1]))


def pad_norm(weight: torch.Tensor, *, size: int) -> torch.Tensor:
    """The weight of an RMS norm over a vector (C,) that is padded with zeros to (`size`,).

        w · x / sqrt(Σx² / C) = w sqrt(C / size) · x / sqrt(Σx² / size)

    The same for the numbers that were there, if the norm's epsilon is 0 or shrinks by C / size as well.
    """
    scaled = weight if size == len(weight) else weight.double() * (len(weight) / size) ** 0.5
    return torch.nn.functional.pad(scaled, (0, size - len(weight)))


def own_norm(weight: torch.Tensor, *, size: int) -> torch.Tensor:
    """The inverse of `pad_norm`."""
    return weight if size == len(weight) else weight[:size].double() * (len(weight) / size) ** 0.5


def listed(*, values: list[float]) -> torch.Tensor:
    """A vector of given numbers."""
    return torch.tensor(values)


def filled(*, shape: list[int], value: float) -> torch.Tensor:
    """A tensor of one number."""
    return torch.full(shape, value)


def inverse_of(frequency: torch.Tensor) -> torch.Tensor:
    """Numbers t, fp32, whose inverse is nearest to a frequency: itself, where fp32 has such a t."""
    best = (1 / frequency.double()).float()
    for direction in (torch.inf, 0.0):
        near = best
        for _ in range(3):
            near = torch.nextafter(near, torch.full_like(near, direction))
            better = (1 / near - frequency).abs() < (1 / best - frequency).abs()
            best = torch.where(better, near, best)
    return best


def rope_of(config: Any, shape: Shape) -> tuple[dict[str, Any], float, float]:
    """The stock rope of an `HfMoeConfig`, and the factors of all and of the position-free queries.

    Returns:
        `rope_parameters`; a scale of all rows of a query; a further one of the position-free rows.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from ..model.attention_hf_moe import softmax_scale
    from ..model.configuration_hf_moe import HfMoeConfig
    from ..model.rotary_hf_moe import HfMoeRotaryEmbedding

    layer_type = config.layer_types[0]
    rope, scale = dict(config.rope_parameters), softmax_scale(config, layer_type)
    stock_scale = (shape.nope + shape.rotary) ** -0.5
    if not shape.table:
        # The stock class multiplies by yarn's factor as ours does.
        own = HfMoeConfig(**config.to_dict() | {"softmax_scale": None})
        stock_scale *= softmax_scale(own, layer_type) * own.qk_head_dim**0.5
    # A hair beside one is the rounding of the powers.
    ratio = 1.0 if abs(scale / stock_scale - 1) < 1e-12 else scale / stock_scale
    if not shape.table:
        return rope, ratio, 1.0
    rotary = HfMoeRotaryEmbedding(config)
    short, factor = rotary.compute_frequencies(None)
    long, within = short, rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope["rope_type"] == "longrope":
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=within + 1)
    else:
        within = config.max_position_embeddings
    columns = list(shape.union) * shape.groups
    return (
        {
            "rope_type": "longrope",
            # 1 to any power is 1: the factors are the inverse frequencies, to the bit.
            "rope_theta": 1.0,
            "factor": 1.0,
            "attention_factor": factor * ratio**0.5,
            "original_max_position_embeddings": within,
            "short_factor": inverse_of(short)[columns].tolist(),
            "long_factor": inverse_of(long)[columns].tolist(),
        },
        1.0,
        ratio if shape.nope else 1.0,
    )


RULES: Mapping[str, Callable[..., torch.Tensor]] = {
    rule.__name__: rule
    for rule in (
        *(stock_query, own_query, select_query, stock_latent, own_latent, latent_bias),
        *(append_rows, pad_columns, pad_norm, own_norm, listed, filled),
    )
}
