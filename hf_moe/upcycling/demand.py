"""What reading calibration text takes: memory, disk and work, from the headers alone. No torch.

Letters: B sequences, S tokens of one, T of all, D hidden, F neurons of the MLP, H heads, G key groups, V head width,
J rotary pairs, Y numbers that a latent may hold.
"""

from dataclasses import dataclass
from math import prod

from .families import CALIBRATION
from .options import CALIBRATED
from .plan import Plan
from .sources import Source

# Tokens in a row, at most: those of a training text of short documents; of experts longer ones teach little.
ATTENTION_CONTEXT, EXPERTS_CONTEXT = 1024, 512
# One row to measure on for so many to learn from.
_LEARNT_ROWS = 8
_FLOAT, _DOUBLE = 4, 8


def rows_of(tokens: int, positions: int) -> tuple[int, int, int]:
    """Of a compressed attention: tokens in a row, rows to learn from, rows to measure on."""
    context = min(ATTENTION_CONTEXT, tokens, positions)
    learnt = tokens // context
    return context, learnt, max(1, learnt // _LEARNT_ROWS)


@dataclass(frozen=True)
class Demand:
    """Of one conversion that reads text.

    Attributes:
        tokens: read. memory: bytes at the peak, beside the interpreter. kept: bytes of what is learnt, which stays
            beside the weights. scratch: bytes on the disk besides, gone when the weights are written. flops: of it.
    """

    tokens: int
    memory: int
    kept: int
    scratch: int
    flops: int


def demand(plan: Plan, source: Source) -> Demand | None:
    """None where no text is read."""
    options = plan.options
    if not options.reads_text:
        return None
    parts = [_experts(plan, source)] if options.mode == "cluster" or options.router in CALIBRATED else []
    parts += [_attention(plan, source)] if options.attention == "compress" else []
    # Neurons are read whole by every expert and counted once.
    learnt = {part.name: tensor for tensor in plan.tensors() for part in tensor.parts if part.branch == CALIBRATION}
    neurons = source.config["intermediate_size"] * _DOUBLE
    kept = sum(neurons if name.endswith("neurons") else prod(t.shape) * _FLOAT for name, t in learnt.items())
    return Demand(
        tokens=sum(part.tokens for part in parts),
        memory=max(part.memory for part in parts),
        kept=kept,
        scratch=sum(part.scratch for part in parts),
        flops=sum(part.flops for part in parts),
    )


def disk_bytes(plan: Plan, source: Source) -> int:
    """The most that a conversion has on the disk at a time."""
    found = demand(plan, source)
    return plan.nbytes if found is None else found.kept + max(found.scratch, plan.nbytes)


def _layer(source: Source) -> int:
    """Parameters of a layer."""
    inner = sum(prod(header.shape) for name, header in source.headers.items() if ".layers." in name)
    return inner // int(source.config["num_hidden_layers"])


def _experts(plan: Plan, source: Source) -> Demand:
    """Of a layer's neurons and routers: all tokens' states, and several numbers for each of their neurons."""
    options, config = plan.options, source.config
    tokens = options.calibration_tokens or 0
    hidden, neurons, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    # The router of prompts compares the tokens of all sources.
    states = 2 + (layers * len(source.branches) if options.router == "prompts" else 0)
    memory = _FLOAT * (_layer(source) + states * tokens * hidden + 6 * tokens * neurons)
    runs = len(source.branches) if options.router == "prompts" else 1
    flops = 2 * tokens * layers * _layer(source) * runs
    if options.mode == "cluster":
        flops += layers * 2 * 12 * neurons * tokens * options.experts
    return Demand(tokens * runs, memory, 0, 0, flops)


def _attention(plan: Plan, source: Source) -> Demand:
    """See `statistics.measure` and `compression` for what each of these numbers is."""
    config, options = source.config, plan.options
    positions = config.get("max_position_embeddings") or ATTENTION_CONTEXT
    row, learnt, measured = rows_of(options.calibration_tokens or 0, positions)
    rows, layers, hidden = learnt + measured, config["num_hidden_layers"], config["hidden_size"]
    heads, groups, width = config["num_attention_heads"], config["num_key_value_heads"], plan.config["v_head_dim"]
    pairs = 0 if plan.config.get("qk_norm") else groups * width // 2
    latent = 2 * pairs + groups * width
    projections = 2 * hidden * width * (heads + groups)
    state, scores, layer = row * hidden * _FLOAT, heads * row**2 * _FLOAT, _layer(source)
    weights = layer * _FLOAT + 2 * projections * _DOUBLE
    moments = latent**2 * _DOUBLE
    # How many intermediates there are at a time is of measurement.
    survey = (rows + layers) * state + learnt * row * latent * _FLOAT + 9 * scores + 5 * moments
    build = 2 * rows * state + 20 * moments + 3 * (heads * width) ** 2 * _DOUBLE
    if options.query_rank is not None:
        # Rows of the queries, their two moments and what factoring them takes.
        numbers, made = heads * width, heads * (plan.config["qk_nope_head_dim"] + plan.config["qk_rope_head_dim"])
        build += 8 * scores + _DOUBLE * (2 * made * numbers + 6 * numbers**2)
    vocabulary = config["vocab_size"] * (hidden + 8 * 128) * _FLOAT
    memory = max(weights + max(survey, build), vocabulary + 2 * rows * state)

    forward = 2 * row * layer + 4 * row**2 * heads * width
    # A limit on the price is met by a few tries.
    runs = 2 + 2 * (1 if options.max_kl is None else 3)
    flops = layers * rows * (runs * forward + 16 * row**2 * heads * pairs) + layers**2 // 2 * forward
    if options.query_rank is not None:
        flops += layers * (learnt * 10 * row**2 * heads * width + 22 * (heads * width) ** 3)
    # Eigenvalues of each number of pairs that is tried.
    flops += layers * 15 * 9 * latent**3
    return Demand(rows * row, memory, 0, layers * 2 * moments, flops)
