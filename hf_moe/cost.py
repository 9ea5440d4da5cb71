"""The arithmetic of a configuration: parameters, FLOPs, bytes, cache, all-to-all. No torch, no weights.

Letters: D hidden, F expert width, E experts, K experts a token, H heads, G key groups, C latent width, P rotary width,
N position-free width of a key head, V value width, L context length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Parameters:
    """Numbers in the weights, by what they belong to. `active` are those that one token meets, `routed` a subset."""

    embedding: int
    head: int
    attention: int
    dense: int
    shared: int
    router: int
    routed: int
    norms: int
    active_routed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.active + self.routed - self.active_routed

    @property
    def active(self) -> int:
        """Those that one token meets, the input embedding counted whole."""
        always = self.embedding + self.head + self.attention + self.dense + self.shared + self.router + self.norms
        return always + self.active_routed


def _get(config: Fields, name: str, default: Any = 0) -> Any:
    value = config.get(name)
    return default if value is None else value


def _latent(config: Fields, layer: int) -> int:
    ranks = config.get("kv_lora_ranks")
    return ranks[layer] if ranks else config["kv_lora_rank"]


def _rotary(config: Fields, layer: int) -> int:
    pairs = config.get("rope_frequencies")
    return 2 * len(pairs[layer]) if pairs else config["qk_rope_head_dim"]


def attention_parameters(config: Fields, layer: int = 0) -> int:
    """Numbers of one layer's attention.

    q: D·H·(N+P), or D·R + R·H·(N+P) with a bottleneck of R; latents and rotary keys: D·(C + G·P); expansion:
    C·H·(N+V); output: H·V·D; and biases and norms where there are any.
    """
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], _latent(config, layer)
    rotary = _rotary(config, layer)
    query = heads * (config["qk_nope_head_dim"] + rotary)
    keys = _get(config, "num_key_value_heads", 1) * rotary
    bottleneck = _get(config, "q_lora_rank")
    count = hidden * bottleneck + bottleneck * query if bottleneck else hidden * query
    count += hidden * (latent + keys)
    count += latent * heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
    count += heads * config["v_head_dim"] * hidden
    count += (bottleneck or query) * bool(config.get("q_bias"))
    count += (latent + keys) * bool(config.get("kv_bias")) + hidden * bool(config.get("o_bias"))
    count += latent * bool(_get(config, "kv_a_layernorm", True))
    count += bottleneck * bool(_get(config, "q_a_layernorm", True))
    if config.get("qk_norm"):
        count += query + keys if config["qk_norm"] == "projection" else 2 * rotary
    return count + heads * bool(config.get("attention_sinks"))


def parameters(config: Fields) -> Parameters:
    """Count the weights of an `HfMoeConfig`, given as a dictionary."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kinds = config.get("mlp_layer_types")
    if not kinds:
        first = min(_get(config, "first_k_dense_replace"), layers)
        kinds = ["dense"] * first + ["sparse"] * (layers - first)
    sparse, dense = kinds.count("sparse"), kinds.count("dense")
    width = config["moe_intermediate_size"]
    shared = _get(config, "shared_expert_intermediate_size") or _get(config, "n_shared_experts") * width
    norms = {"pre": 2, "post": 2, "sandwich": 4}[_get(config, "norm_placement", "pre")]
    experts = config["n_routed_experts"]
    embedding = config["vocab_size"] * hidden
    return Parameters(
        embedding=embedding,
        head=0 if config.get("tie_word_embeddings") else embedding,
        attention=sum(attention_parameters(config, layer) for layer in range(layers)),
        dense=dense * 3 * hidden * config["intermediate_size"],
        shared=sparse * (3 * hidden * shared + hidden * bool(config.get("shared_expert_gate"))),
        router=sparse * experts * (hidden + (config.get("topk_method") == "noaux_tc")),
        routed=sparse * 3 * hidden * width * experts,
        norms=(layers * norms + 1) * hidden,
        active_routed=sparse * 3 * hidden * width * config["num_experts_per_tok"],
    )


def cache_widths(config: Fields) -> list[int]:
    """Numbers that the cache holds a token in each layer: latent and rotary keys, C + G·P."""
    groups = _get(config, "num_key_value_heads", 1)
    return [_latent(config, i) + groups * _rotary(config, i) for i in range(config["num_hidden_layers"])]


def cache_numbers(config: Fields) -> int:
    """Numbers that the cache holds a token, all layers."""
    return sum(cache_widths(config))


def forward_flops(config: Fields, context: int) -> int:
    """FLOPs of one token's forward pass with `context` cached tokens, keys and values expanded once.

    2 for every active weight but the input embedding, and 2·L·H·(N+P+V) a layer for scores and their use.
    """
    count = parameters(config)
    head = count.head or count.embedding
    weights = count.active - count.embedding - count.head + head
    layers = range(config["num_hidden_layers"])
    per_head = sum(config["qk_nope_head_dim"] + _rotary(config, i) + config["v_head_dim"] for i in layers)
    attention = 2 * context * config["num_attention_heads"] * per_head
    return 2 * weights + attention


def training_flops(config: Fields, length: int) -> int:
    """FLOPs a token of forward and backward (three times the forward), causal: half of `length` cached on average."""
    return 3 * forward_flops(config, length // 2)


def all_to_all_bytes(config: Fields, tokens: int, ranks: int, item_size: int = 2) -> int:
    """Bytes that one rank sends in the forward pass with experts spread over `ranks`: there and back, every layer.

    2 · T · K · D · item_size · (1 - 1/ranks) a sparse layer, for an even load.
    """
    kinds = config.get("mlp_layer_types") or ["sparse"] * config["num_hidden_layers"]
    routed = kinds.count("sparse") * tokens * config["num_experts_per_tok"] * config["hidden_size"]
    return 2 * routed * item_size * (ranks - 1) // ranks
