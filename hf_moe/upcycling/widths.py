"""What each layer of a compressed model caches, what may be asked for, and the configuration that says it. No torch.

Letters: G key groups, F frequencies, P rotary width, C latent width, V value width.
"""

from dataclasses import dataclass
from typing import Any

from .options import Options
from .plan import TargetTensor


@dataclass(frozen=True)
class Width:
    """One layer: C, and the frequency of each rotary pair; None where the source's rotary keys stay as they are."""

    latent: int
    frequencies: tuple[int, ...] | None


@dataclass(frozen=True)
class Limits:
    """What the source's attention has: layers, G, head width, and whether its keys may be compressed.

    queries: rank at which a bottleneck of the queries loses nothing, min(D, H·head); with a bias D + 1 in place of D.
    """

    layers: int
    groups: int
    head: int
    keys: bool
    queries: int

    @property
    def numbers(self) -> int:
        """Cached numbers a token and layer of the source."""
        return 2 * self.groups * self.head

    @property
    def fixed(self) -> int:
        """Those of rotary keys that have to stay; 0 where keys may be compressed."""
        return 0 if self.keys else self.groups * self.head

    @property
    def least(self) -> int:
        """The smallest layer: a rotary pair and one latent number."""
        return (2 if self.keys else self.fixed) + 1

    def widest(self, rope_dim: int) -> int:
        """C that holds all that `rope_dim` rotary numbers leave."""
        return self.groups * self.head + (self.groups * self.head - rope_dim if self.keys else 0)


def limits_of(fields: dict[str, Any], family: str) -> Limits:
    """From the fields of the exact target.

    Raises:
        ValueError: heads that rotate in part only.
    """
    if fields["qk_nope_head_dim"]:
        raise ValueError(
            f"attention='compress' needs keys that rotate whole: {family} rotates {fields['qk_rope_head_dim']} of "
            f"{fields['qk_rope_head_dim'] + fields['qk_nope_head_dim']} numbers of a head; choose attention='exact'"
        )
    keys = fields.get("qk_norm") is None
    inputs, numbers = fields["hidden_size"] + fields["q_bias"], fields["num_attention_heads"] * fields["v_head_dim"]
    groups, head = fields["num_key_value_heads"], fields["v_head_dim"]
    return Limits(fields["num_hidden_layers"], groups, head, keys, min(inputs, numbers))


def check_budget(options: Options, limits: Limits, family: str) -> None:
    """Refuse what no layer can be built with.

    Raises:
        ValueError: with both numbers.
    """
    if options.query_rank is not None and options.query_rank > limits.queries:
        raise ValueError(
            f"query_rank={options.query_rank} is above {limits.queries}, at which the source's queries lose nothing"
        )
    if options.cache_ratio is not None and (share := options.cache_ratio * limits.numbers) < limits.least:
        raise ValueError(
            f"cache_ratio={options.cache_ratio} leaves {share:.0f} of {limits.numbers} numbers a token and layer; the "
            f"least that can be built is {limits.least}, cache_ratio={_rounded_up(limits.least / limits.numbers)}"
            + ("" if limits.keys else f": the keys of {family} have norms of their own and stay as they are")
        )
    if options.rope_dim is not None:
        if not limits.keys and options.rope_dim != limits.head:
            raise ValueError(
                f"rope_dim={options.rope_dim}: the keys of {family} have norms of their own and cannot be compressed; "
                f"rope_dim={limits.head} keeps them"
            )
        most = limits.groups * limits.head if limits.keys else limits.head
        if options.rope_dim > most:
            raise ValueError(f"rope_dim={options.rope_dim} is above the {most} that the source's keys have")
        assert options.kv_rank is not None
        if options.kv_rank > (widest := limits.widest(options.rope_dim)):
            raise ValueError(
                f"kv_rank={options.kv_rank} is above {widest}, all that keys and values of the source hold beside "
                f"rope_dim={options.rope_dim}"
            )


def _rounded_up(ratio: float) -> float:
    """To four digits."""
    return -(-ratio * 10000 // 1) / 10000


def provisional(options: Options, limits: Limits) -> list[Width]:
    """What a plan shows before any text is read: the same in every layer, as many cached numbers in all as were asked.

    With `max_kl` nobody knows yet, and all that the source has is shown.
    """
    if options.rope_dim is not None and options.kv_rank is not None:
        pairs, latent = options.rope_dim // 2, options.kv_rank
    else:
        numbers = int((options.cache_ratio or 1.0) * limits.numbers)
        pairs = max(1, numbers // 8)
        latent = numbers - (2 * pairs if limits.keys else limits.fixed)
    frequencies = tuple(pair // limits.groups for pair in range(pairs)) if limits.keys else None
    return [Width(latent, frequencies)] * limits.layers


def compressed_fields(fields: dict[str, Any], widths: list[Width]) -> dict[str, Any]:
    """The exact target's fields with the attention of these layers."""
    head = fields["v_head_dim"]
    latents = [width.latent for width in widths]
    changed: dict[str, Any] = {
        "kv_lora_rank": max(latents),
        "kv_lora_ranks": latents if len(set(latents)) > 1 else None,
        "o_bias": True,
        "softmax_scale": fields.get("softmax_scale") or head**-0.5,
    }
    if widths[0].frequencies is not None:
        frequencies = [list(width.frequencies or ()) for width in widths]
        changed |= {
            "num_key_value_heads": 1,
            "qk_nope_head_dim": head,
            "qk_rope_head_dim": 2 * max(map(len, frequencies)),
            "rope_table_dim": head,
            "rope_frequencies": frequencies,
        }
    return fields | changed


def attention_tensors(fields: dict[str, Any], width: Width, layer: int) -> list[TargetTensor]:
    """The learnt tensors of a layer, in the order in which they are kept."""
    hidden, heads, head = fields["hidden_size"], fields["num_attention_heads"], fields["v_head_dim"]
    groups, rotary = fields["num_key_value_heads"], fields["qk_rope_head_dim"]
    query, nope, keys = heads * rotary, 0, groups * rotary
    if width.frequencies is not None:
        keys, nope = 2 * len(width.frequencies), head
        query = heads * (nope + keys)
    rank = fields.get("q_lora_rank")
    first, numbers = ("q_proj", query) if rank is None else ("q_a_proj", rank)
    shapes: list[tuple[str, tuple[int, ...]]] = [(f"{first}.weight", (numbers, hidden))]
    shapes += [(f"{first}.bias", (numbers,))] if fields["q_bias"] else []
    shapes += [] if rank is None else [("q_b_proj.weight", (query, rank))]
    shapes += [("kv_a_proj_with_mqa.weight", (width.latent + keys, hidden))]
    shapes += [("kv_a_proj_with_mqa.bias", (width.latent + keys,))] if fields["kv_bias"] else []
    shapes += [("kv_b_proj.weight", (heads * (nope + head), width.latent))]
    shapes += [("o_proj.weight", (hidden, heads * head)), ("o_proj.bias", (hidden,))]
    return [
        TargetTensor(f"layers.{layer}.self_attn.{name}", shape, "F32", "calibrated", (), (), layer)
        for name, shape in shapes
    ]
