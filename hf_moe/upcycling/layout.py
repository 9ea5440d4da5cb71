"""Which tensors a target has: the plan of one source, family and choice.

Letters: D hidden, F expert width, E experts, H heads, G key groups, C latent width, P rotary width, N position-free
width of a key head, V width of a value head.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .families import CALIBRATION, IGNORED, INNER, Family, Part, family_of, head_dim, role_rows
from .headers import FLOAT_TYPES
from .options import CALIBRATED, DTYPES, Options
from .plan import DTYPE_NAMES, Plan, TargetTensor, pack
from .sources import Source
from .widths import Width, attention_tensors, check_budget, compressed_fields, limits_of, provisional


def make_plan(source: Source, options: Options, widths: list[Width] | None = None) -> Plan:
    """Decide every tensor of the target.

    Args:
        widths: what each layer of a compressed attention caches; without them all layers are planned alike.
    Raises:
        ValueError: a tensor that is missing, has another shape than the configuration says, or is not known to the
            family; an option that the target cannot hold; sizes that do not divide.
    """
    family = family_of(source.config)
    layout = Layout(source, family, options, widths)
    layout.check_source()
    config = layout.target_config()
    tensors = list(layout.tensors())
    if options.mode == "branch":
        tensors = [layout.branched(tensor) for tensor in tensors]
    return Plan(source.location, source.revision, family.model_type, options, config, pack(tensors, options))


def exact_config(source: Source, options: Options) -> dict[str, Any]:
    """Fields of the target's configuration, with exact attention."""
    return Layout(source, family_of(source.config), options).exact_config()


class Layout:
    """Lists the target's tensors of one source, family and choice."""

    def __init__(self, source: Source, family: Family, options: Options, widths: list[Width] | None = None):
        self.headers = source.headers
        self.branches = len(source.branches)
        if (options.mode == "branch") != (self.branches > 1):
            raise ValueError(f"mode={options.mode!r} with {self.branches} sources: branch takes several, others one")
        if options.mode == "branch" and options.experts % self.branches:
            raise ValueError(f"experts={options.experts} is not a multiple of the {self.branches} sources")
        self.family = family
        self.options = options
        self.source_config = config = source.config
        for layer in options.dense_layers:
            if not 0 <= layer < config["num_hidden_layers"]:
                raise ValueError(f"dense layer {layer} is none of the {config['num_hidden_layers']} layers")
        self.fields = family.target_fields(config)
        self.residual = config.get(family.residual_multiplier, 1.0) if family.residual_multiplier else 1.0
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.nope, self.value = self.fields["qk_nope_head_dim"], self.fields["v_head_dim"]
        self.latent = self.groups * (self.value + self.nope)
        self.width = config["intermediate_size"] // options.shards
        if config["intermediate_size"] % options.shards:
            raise ValueError(
                f"intermediate_size={config['intermediate_size']} is not divisible by shards={options.shards}"
                + (" (experts and shared shards)" if options.mode == "cluster" else "")
            )
        # The experts of a group are the copies of one shard.
        self.grouped = options.mode == "split" and options.split_scale == "groups"
        layers = range(config["num_hidden_layers"])
        self.sparse = [options.experts > 1 and i not in options.dense_layers for i in layers]
        floats = [header.dtype for header in self.headers.values() if header.dtype in FLOAT_TYPES]
        if not floats:
            raise ValueError("the source holds no weights in a floating-point type")
        self.dtype = DTYPES[options.dtype] or max(sorted(set(floats)), key=floats.count)
        self.widths = None
        if options.attention == "compress":
            limits = limits_of(self.exact_config(), family.model_type)
            check_budget(options, limits, family.model_type)
            self.widths = widths or provisional(options, limits)

    def has(self, role: str, layer: int, suffix: str = "weight") -> bool:
        return self.part(role, layer, suffix).name in self.headers

    def part(self, role: str, layer: int = 0, suffix: str = "weight") -> Part:
        return self.family.part(role, layer, self.source_config, suffix)

    def check_source(self) -> None:
        """Every tensor is known, and those that are needed are there in the shape that the configuration says."""
        layers = self.source_config["num_hidden_layers"]
        for name in self.headers:
            known = self.family.role_of(name)
            if known is None and not IGNORED.fullmatch(name):
                raise ValueError(f"{name} is no tensor of {self.family.architecture}, and would be lost")
            if known is not None and known[1] is not None and known[1] >= layers:
                raise ValueError(f"{name} belongs to layer {known[1]}, num_hidden_layers={layers}")
        hidden, vocabulary = self.source_config["hidden_size"], self.source_config["vocab_size"]
        self._expect("embed", 0, (vocabulary, hidden))
        self._expect("norm", 0, (hidden,))
        if not self.fields["tie_word_embeddings"]:
            self._expect("head", 0, (vocabulary, hidden))
        for layer in range(layers):
            modules = self.family.modules()
            for role, module in modules.items():
                if role in ("q", "k", "v", "o", "gate", "up", "down"):
                    fused = self.family.fused.get(module, (role,))
                    rows = sum(role_rows(other, self.source_config) for other in fused)
                    columns = {"o": self.heads * self.value, "down": self.source_config["intermediate_size"]}
                    self._expect(role, layer, (rows, columns.get(role, hidden)))
                elif role in ("q_norm", "k_norm"):
                    per_head = self.family.constants["qk_norm"] == "head"
                    size = head_dim(self.source_config) if per_head else role_rows(role[0], self.source_config)
                    self._expect(role, layer, (size,))
                else:
                    self._expect(role, layer, (hidden,))
        for role in "qkvo":
            if 0 < (count := sum(self.has(role, layer, "bias") for layer in range(layers))) < layers:
                raise ValueError(f"{count} of {layers} layers have a bias in {INNER[role]}: all or none can be held")

    def _expect(self, role: str, layer: int, shape: tuple[int, ...]) -> None:
        name = self.part(role, layer).name
        if name not in self.headers:
            raise ValueError(f"{name} is missing from the source")
        if self.headers[name].shape != shape:
            raise ValueError(
                f"{name} has the shape {list(self.headers[name].shape)}, the configuration says {list(shape)}"
            )

    def target_config(self) -> dict[str, Any]:
        exact = self.exact_config()
        return exact if self.widths is None else compressed_fields(exact, self.widths)

    def exact_config(self) -> dict[str, Any]:
        options = self.options
        # Normalised weights sum to 1 over all shards, or over each one; each shard's share must be 1.
        shares = routed = options.shards - options.shared_shards
        if options.mode == "cluster":
            # Those that a token meets.
            shares = options.top_k or 1
        fields = dict(self.fields)
        fields |= {
            "architectures": ["HfMoeForCausalLM"],
            "dtype": DTYPE_NAMES[self.dtype],
            "kv_lora_rank": self.latent,
            "kv_a_layernorm": False,
            "q_bias": self.has("q", 0, "bias"),
            "kv_bias": self.has("k", 0, "bias"),
            "o_bias": self.has("o", 0, "bias") or self.has("v", 0, "bias"),
            "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in self.sparse],
            "n_routed_experts": options.experts,
            "num_experts_per_tok": options.top_k,
            "moe_intermediate_size": self.width,
            "n_shared_experts": options.shared_shards,
            "norm_topk_prob": True,
            "n_group": routed if self.grouped else 1,
            "topk_each_group": self.grouped,
            "routed_scaling_factor": self.residual * (shares if options.split_scale == "factor" else 1.0),
        }
        if options.query_rank is not None:
            fields |= {"q_lora_rank": options.query_rank, "q_a_layernorm": False}
        return fields

    def tensors(self) -> Iterator[TargetTensor]:
        """All of them, the outer ones around the layers."""
        yield self._copy("model.embed_tokens.weight", self.part("embed"), None)
        for layer in range(self.source_config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for norm in self.family.norms:
                yield self._norm(f"{prefix}{norm}.weight", self.part(norm, layer), layer)
            yield from self._attention(f"{prefix}self_attn.", layer)
            yield from (self._mixture if self.sparse[layer] else self._dense)(f"{prefix}mlp.", layer)
        yield self._norm("model.norm.weight", self.part("norm"), None)
        if not self.fields["tie_word_embeddings"]:
            yield self._copy("lm_head.weight", self.part("head"), None)

    def _compressed_attention(self, prefix: str, layer: int) -> Iterator[TargetTensor]:
        assert self.widths is not None
        for tensor in attention_tensors(self.exact_config(), self.widths[layer], layer):
            name = prefix + tensor.name.removeprefix(f"layers.{layer}.self_attn.")
            made = self._make(name, tensor.shape, "calibrated", [], layer)
            yield replace(made, parts=(Part(tensor.name, branch=CALIBRATION),))
        yield from self._head_norms(prefix, layer)

    def _head_norms(self, prefix: str, layer: int) -> Iterator[TargetTensor]:
        for role in ("q_norm", "k_norm"):
            if role in self.family.modules():
                yield self._norm(f"{prefix}{role}.weight", self.part(role, layer), layer)

    def _attention(self, prefix: str, layer: int) -> Iterator[TargetTensor]:
        if self.widths is not None:
            yield from self._compressed_attention(prefix, layer)
            return
        shape = {"groups": self.groups, "nope": self.nope}
        hidden, heads = self.source_config["hidden_size"], {"heads": self.heads, "groups": self.groups}
        keys = self.groups * self.fields["qk_rope_head_dim"]
        query = self.heads * head_dim(self.source_config)
        for suffix, size in (("weight", (query, hidden)), ("bias", (query,))):
            if self.has("q", layer, suffix):
                name, part = f"{prefix}q_proj.{suffix}", self.part("q", layer, suffix)
                if self.nope:
                    yield self._make(name, size, "position_free_first", [part], layer, heads=self.heads, nope=self.nope)
                else:
                    yield self._copy(name, part, layer)
        k, v = self.part("k", layer), self.part("v", layer)
        name = f"{prefix}kv_a_proj_with_mqa."
        yield self._make(f"{name}weight", (self.latent + keys, hidden), "latent_and_keys", [v, k], layer, **shape)
        if self.has("k", layer, "bias"):
            bias = self.part("k", layer, "bias")
            yield self._make(f"{name}bias", (self.latent + keys,), "key_bias", [bias], layer, **shape, value=self.value)
        expanded = (self.heads * (self.nope + self.value), self.latent)
        yield self._make(
            f"{prefix}kv_b_proj.weight",
            expanded,
            "select_groups",
            [],
            layer,
            exact=self.residual == 1.0,
            **heads,
            nope=self.nope,
            value=self.value,
            scale=self.residual,
        )
        yield self._copy(f"{prefix}o_proj.weight", self.part("o", layer), layer)
        with_value, with_output = self.has("v", layer, "bias"), self.has("o", layer, "bias")
        if with_value or with_output:
            parts = [self.part("o", layer, "bias")] if with_output else []
            parts += [self.part("o", layer), self.part("v", layer, "bias")] if with_value else []
            exact = not with_value and self.residual == 1.0
            yield self._make(
                f"{prefix}o_proj.bias", (hidden,), "output_bias", parts, layer, exact, **heads, scale=self.residual
            )
        yield from self._head_norms(prefix, layer)

    def _dense(self, prefix: str, layer: int) -> Iterator[TargetTensor]:
        yield from self._mlp(prefix, layer, 0, self.source_config["intermediate_size"], self.residual)

    def _mixture(self, prefix: str, layer: int) -> Iterator[TargetTensor]:
        options, hidden = self.options, self.source_config["hidden_size"]
        routed = options.shards - options.shared_shards
        if options.router in CALIBRATED:
            gate = self._make(f"{prefix}gate.weight", (options.experts, hidden), "calibrated", [], layer)
            yield replace(gate, parts=(Part(f"layers.{layer}.router", branch=CALIBRATION),))
        else:
            yield self._make(
                f"{prefix}gate.weight",
                (options.experts, hidden),
                f"router_{options.router}",
                [],
                layer,
                repeats=1 if options.mode == "cluster" or self.grouped else routed,
                std=options.router_std,
                seed=f"{options.seed}/{layer}",
            )
        if options.shared_shards:
            stop = options.shared_shards * self.width
            yield from self._mlp(f"{prefix}shared_experts.", layer, 0, stop, self.residual)
        for expert in range(options.experts):
            shard = expert * routed // options.experts if self.grouped else expert % routed
            start = (options.shared_shards + shard) * self.width
            scale = float(routed) if options.split_scale == "down" else 1.0
            tensors = self._mlp(f"{prefix}experts.{expert}.", layer, start, start + self.width, scale)
            yield from map(self._changed, tensors) if options.mode in ("drop", "noise") else tensors

    def branched(self, tensor: TargetTensor) -> TargetTensor:
        """An expert from its source, a router from the text, anything else as the mean of all."""
        if tensor.rule == "calibrated":
            return tensor
        _, found, rest = tensor.name.partition(".experts.")
        if found:
            branch = int(rest.split(".")[0]) % self.branches
            return replace(tensor, parts=tuple(replace(part, branch=branch) for part in tensor.parts))
        parts = tuple(replace(part, branch=b) for part in tensor.parts for b in range(self.branches))
        return replace(tensor, parts=parts, mean_of=self.branches if parts else 1)

    def _changed(self, tensor: TargetTensor) -> TargetTensor:
        """An expert's copy of a matrix, with the change of the mode in place of the copying."""
        options, (expert, _, matrix) = self.options, tensor.name.rpartition(".experts.")
        expert = f"{options.seed}/{expert}/{matrix.partition('.')[0]}"
        arguments: dict[str, Any] = {"values": f"{expert}/{matrix}"}
        if options.mode == "drop":
            dim = 1 if matrix.endswith("down_proj.weight") else 0
            arguments |= {"dim": dim, "ratio": options.drop_ratio, "neurons": expert}
        else:
            arguments |= {"std": options.noise_std}
        rule = {"drop": "redraw", "noise": "noise"}[options.mode]
        return replace(tensor, rule=rule, arguments=tuple(sorted(arguments.items())))

    def _mlp(self, prefix: str, layer: int, start: int, stop: int, scale: float) -> Iterator[TargetTensor]:
        """Neurons `start` to `stop` of the dense MLP. A scale goes on the down-projection: silu is not linear.

        In mode `cluster` they are counted in the order that was learnt from text.
        """
        if self.options.mode == "cluster" and self.sparse[layer]:
            yield from self._gathered(prefix, layer, start, stop, scale)
            return
        for role in ("gate", "up"):
            whole = self.part(role, layer)
            yield self._copy(
                f"{prefix}{role}_proj.weight", Part(whole.name, whole.start + start, whole.start + stop), layer
            )
        name, down = f"{prefix}down_proj.weight", self.part("down", layer)
        shape = (self.source_config["hidden_size"], stop - start)
        if scale == 1.0 and stop - start == self.source_config["intermediate_size"]:
            yield self._copy(name, down, layer)
        else:
            arguments = {"start": start, "stop": stop, "scale": scale}
            yield self._make(name, shape, "columns", [down], layer, scale == 1.0, **arguments)

    def _gathered(self, prefix: str, layer: int, start: int, stop: int, scale: float) -> Iterator[TargetTensor]:
        hidden, neurons = self.source_config["hidden_size"], Part(f"layers.{layer}.neurons", start, stop, CALIBRATION)
        for role in ("gate", "up"):
            parts = [self.part(role, layer)]
            tensor = self._make(f"{prefix}{role}_proj.weight", (stop - start, hidden), "gather_rows", parts, layer)
            yield replace(tensor, parts=(*parts, neurons))
        parts, exact = [self.part("down", layer)], scale == 1.0
        name, shape = f"{prefix}down_proj.weight", (hidden, stop - start)
        tensor = self._make(name, shape, "gather_columns", parts, layer, exact, scale=scale)
        yield replace(tensor, parts=(*parts, neurons))

    def _norm(self, name: str, part: Part, layer: int | None) -> TargetTensor:
        if not self.family.norm_offset:
            return self._copy(name, part, layer)
        shape = self.headers[part.name].shape
        return self._make(name, shape, "add", [part], layer, exact=False, offset=self.family.norm_offset)

    def _copy(self, name: str, part: Part, layer: int | None) -> TargetTensor:
        shape = self.headers[part.name].shape
        if part.stop is not None:
            shape = (part.stop - part.start, *shape[1:])
            if part.start == 0 and part.stop == self.headers[part.name].shape[0]:
                part = Part(part.name)
        return self._make(name, shape, "copy", [part], layer)

    def _make(
        self,
        name: str,
        shape: tuple[int, ...],
        rule: str,
        parts: list[Part],
        layer: int | None,
        exact: bool = True,
        **arguments: Any,
    ) -> TargetTensor:
        dtype = DTYPES[self.options.dtype]
        if dtype is None:
            dtypes = {self.headers[part.name].dtype for part in parts} or {self.dtype}
            # A computed number is not representable in the source's 16 bits: it stays in float32.
            dtype = dtypes.pop() if exact and len(dtypes) == 1 else "F32"
        return TargetTensor(name, shape, dtype, rule, tuple(parts), tuple(sorted(arguments.items())), layer)
