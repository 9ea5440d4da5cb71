"""What a user may choose about a conversion, checked once."""

from dataclasses import asdict, dataclass
from typing import Any

MODES = {
    "copy": "every expert is the dense MLP; exact",
    "split": "the dense MLP cut into shards, some for every token and the others copied, or all copied; exact",
    "drop": "copies in which drop_ratio of the neurons are drawn anew, others in each expert; not exact",
    "noise": "copies with normal noise of noise_std times each matrix's deviation; not exact",
    "cluster": "the dense MLP's neurons grouped by co-activation, as many parameters as before; not exact",
    "branch": "experts from several dense models of one shape in turn, everything else their mean; not exact",
}
SPLIT_SCALES = {
    "groups": "nowhere: a router that takes as many copies of every shard, with weights that sum to 1 for each shard",
    "factor": "in the configuration's routed_scaling_factor; weights stay the source's numbers",
    "down": "on the experts' down-projections, for classes without such a factor",
}
EXACT_MODES = ("copy", "split")
ATTENTIONS = {
    "exact": "grouped-query attention as latent attention, same logits, same cache size",
    "compress": "a smaller cache: rotary energy gathered in few pairs, the rest in a latent; not exact, and measured",
}
ROUTERS = {
    "random": "normal weights of standard deviation router_std",
    "zero": "zeros: every token prefers the first experts",
    "centroids": "centres of the clusters of the MLP's inputs on calibration text",
    "activity": "least squares from the MLP's inputs to what each expert of mode cluster contributes",
    "prompts": "mean input over the prompts of each source of mode branch",
}
# Those that read text.
CALIBRATED = ("centroids", "activity", "prompts")
DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Options:
    """Choices of one conversion.

    Attributes:
        mode: a key of `MODES`.
        experts, top_k: E and K of the target; K is 2 by default. `experts=1` keeps the MLPs dense, converts the
            attention only and leaves K = 1.
        shards: into how many parts `split` cuts the MLP; in `cluster` experts + shared_shards; 1 elsewhere.
        shared_shards: how many of them are always on.
        split_scale: a key of `SPLIT_SCALES`, where the number of routed shards stands that normalised weights lack;
            "groups" by default in mode `split`. With the others a token may miss shards once the router learns.
        drop_ratio: share of the neurons that `drop` draws anew. noise_std: strength of `noise`.
        attention: a key of `ATTENTIONS`. "compress" needs one of `cache_ratio`, share of the source's cache;
            `kv_rank` with `rope_dim`, latent and rotary numbers of every layer; `max_kl`, nats a token on text.
        query_rank: width of a bottleneck that a compressed attention's queries go through, the same in every layer;
            None for none. Fewer weights below D·Q / (D + Q) of D inputs and Q query numbers only.
        uniform: whether `cache_ratio` and `max_kl` give every layer the same sizes.
        router: a key of `ROUTERS`, with `router_std`; "activity" by default in mode
            `cluster`, "random" elsewhere.
        calibration: text files that mode `cluster` and some routers learn from, by default the second half of Python's
            language reference; for the router "prompts" one for each source. calibration_tokens: how many of each,
            16,384 by default if attention is compressed and 4,096 if not.
        dense_layers: layers that keep their MLP.
        dtype: "auto" keeps the source's; a GGUF's is float32.
        seed: of everything random.
        max_shard_bytes: size limit of one file of the target.

    Raises:
        ValueError: with both numbers, when they cannot go together.
    """

    mode: str = "copy"
    experts: int = 8
    top_k: int | None = None
    shards: int = 1
    shared_shards: int = 0
    split_scale: str | None = None
    drop_ratio: float = 0.5
    noise_std: float = 0.05
    attention: str = "exact"
    cache_ratio: float | None = None
    kv_rank: int | None = None
    rope_dim: int | None = None
    max_kl: float | None = None
    query_rank: int | None = None
    uniform: bool = False
    router: str | None = None
    router_std: float = 0.02
    calibration: tuple[str, ...] = ()
    calibration_tokens: int | None = None
    dense_layers: tuple[int, ...] = ()
    dtype: str = "auto"
    seed: int = 0
    max_shard_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.split_scale is None:
            object.__setattr__(self, "split_scale", "groups" if self.mode == "split" else "factor")
        if self.router is None:
            object.__setattr__(self, "router", "activity" if self.mode == "cluster" else "random")
        for name, known in (
            ("mode", MODES),
            ("attention", ATTENTIONS),
            ("router", ROUTERS),
            ("split_scale", SPLIT_SCALES),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; known are {', '.join(known)}")
        if self.top_k is None:
            object.__setattr__(self, "top_k", 1 if self.experts == 1 else 2)
        if self.calibration_tokens is None:
            object.__setattr__(self, "calibration_tokens", 16384 if self.attention == "compress" else 4096)
        least_of = {
            "experts": 1,
            "top_k": 1,
            "shards": 1,
            "shared_shards": 0,
            "max_shard_bytes": 1,
            "calibration_tokens": 2,
        }
        for name, least in least_of.items():
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if any(not isinstance(layer, int) for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers!r} must be whole numbers")
        for name, most in (("drop_ratio", 1.0), ("noise_std", 1e6), ("router_std", 1e6)):
            # Written so that NaN is refused.
            if not isinstance(value := getattr(self, name), int | float) or not 0 <= value <= most:
                raise ValueError(f"{name}={value!r} must be a number between 0 and {most:,.0f}")
        if self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is above experts={self.experts}")
        self._check_router()
        self._check_budget()
        if self.mode == "split":
            self._check_split()
        elif self.mode == "cluster":
            self._check_cluster()
        elif self.split_scale == "groups":
            raise ValueError(f"split_scale='groups' belongs to mode='split', not to mode={self.mode!r}")
        elif self.shards != 1 or self.shared_shards:
            raise ValueError(
                f"shards={self.shards} and shared_shards={self.shared_shards} belong to mode='split', "
                f"not to mode={self.mode!r}"
            )

    def _check_budget(self) -> None:
        ranks = (self.kv_rank, self.rope_dim)
        given = [name for name in ("cache_ratio", "max_kl") if getattr(self, name) is not None]
        given += ["kv_rank with rope_dim"] if ranks != (None, None) else []
        if self.attention != "compress":
            given += ["query_rank"] if self.query_rank is not None else []
            if given or self.uniform:
                raise ValueError(
                    f"{given[0] if given else 'uniform'} belongs to attention='compress', "
                    f"not to attention={self.attention!r}"
                )
            return
        if self.mode == "branch":
            raise ValueError("attention='compress' takes one source, not the several of mode='branch'")
        if len(given) != 1:
            raise ValueError(
                "attention='compress' needs exactly one of cache_ratio, kv_rank with rope_dim, and max_kl; got "
                + (" and ".join(given) or "none")
            )
        if None in ranks and ranks != (None, None):
            raise ValueError(f"kv_rank={self.kv_rank} and rope_dim={self.rope_dim}: give both or neither")
        for name, most in (("cache_ratio", 1.0), ("max_kl", 1e6)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not 0 < value <= most):
                raise ValueError(f"{name}={value!r} must be a number above 0, at most {most:,.0f}")
        for name, least in (("kv_rank", 1), ("rope_dim", 2), ("query_rank", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} must be even: rotation acts on pairs")

    def _check_split(self) -> None:
        if self.shards < 2:
            raise ValueError(f"mode='split' needs at least 2 shards, got {self.shards}")
        if self.shared_shards >= self.shards:
            raise ValueError(f"shared_shards={self.shared_shards} must be below shards={self.shards}")
        if self.router == "zero" and self.split_scale != "groups":
            raise ValueError(
                f"router='zero' needs split_scale='groups', not {self.split_scale!r}: with equal scores a token would "
                "miss a shard"
            )
        routed = self.shards - self.shared_shards
        for name in ("experts", "top_k"):
            if getattr(self, name) % routed:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of the {routed} routed shards "
                    f"(shards={self.shards}, shared_shards={self.shared_shards}): every token needs each of them"
                )

    def _check_cluster(self) -> None:
        if self.experts < 2:
            raise ValueError(f"mode='cluster' needs at least 2 experts, got {self.experts}")
        if self.split_scale != "factor":
            raise ValueError("mode='cluster' needs split_scale='factor'")
        parts = self.experts + self.shared_shards
        if self.shards not in (1, parts):
            raise ValueError(f"shards={self.shards} must be experts + shared_shards = {parts} in mode='cluster'")
        object.__setattr__(self, "shards", parts)

    def _check_router(self) -> None:
        for router, mode in (("activity", "cluster"), ("prompts", "branch")):
            if self.router == router and self.mode != mode:
                raise ValueError(f"router={router!r} belongs to mode={mode!r}, not to mode={self.mode!r}")
        if self.calibration and not self.reads_text:
            raise ValueError(
                f"calibration text is not read with mode={self.mode!r}, router={self.router!r} and "
                f"attention={self.attention!r}"
            )
        if self.router == "prompts" and not self.calibration:
            raise ValueError("router='prompts' needs calibration: a file of prompts for each source")

    @property
    def reads_text(self) -> bool:
        """Whether the conversion learns from text."""
        return self.mode == "cluster" or self.router in CALIBRATED or self.attention == "compress"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"dense_layers": list(self.dense_layers), "calibration": list(self.calibration)}
