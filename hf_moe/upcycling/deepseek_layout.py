"""A model of ours as stock DeepseekV3 and back: the configuration and the tensors, from the headers; see `deepseek`.

The exported configuration carries ours under `MARKER`, so that a folder that nobody has trained since comes back to the
bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from .families import Part
from .headers import TensorHeader
from .plan import TargetTensor
from .sources import FolderSource

MARKER = "hf_moe"


class StockLayout:
    """The stock tensors of a model of ours, and ours of the stock ones.

    Args:
        config: an `HfMoeConfig`. dtype: of the projections, as safetensors names it.
        norms: for latents without norm the mean root mean square of each layer's, so that the stock norm is near to
            what was there; None for constants that undo it.
    Raises:
        ValueError: float16 and a latent without norm.
    """

    def __init__(self, config: Any, dtype: str, norms: list[float] | None = None):
        from .deepseek import Shape, norm_constants, rope_of
        from .sources import torch_dtype

        self.config, self.dtype, self.norms = config, dtype, norms
        self.shape = Shape.of(config)
        self.rope, self.scale, self.free_scale = rope_of(config, self.shape)
        hidden, free = config.hidden_size, config.qk_nope_head_dim
        self.queries = [config.num_attention_heads * (free + width) for width in config.rotary_widths]
        self.constants: list[float] = []
        if not config.kv_a_layernorm and norms is None:
            self.constants = norm_constants(self.shape.latent, torch_dtype(dtype))
        self.latent = self.shape.latent + len(self.constants)
        # A bottleneck of the queries: ours with its norm, or one whose norm a constant undoes.
        self.bottleneck, self.query_constants = config.q_lora_rank, []
        if config.q_lora_rank is None and config.q_bias:
            self.bottleneck = max(self.queries)
        if self.bottleneck and not (config.q_lora_rank and config.q_a_layernorm):
            self.query_constants = norm_constants(self.bottleneck, torch_dtype(dtype))
            self.bottleneck += len(self.query_constants)
        self.query_columns = self.bottleneck or hidden
        self.biased = bool(self.constants or self.query_constants or config.kv_bias or config.o_bias or config.q_bias)

    def fields(self) -> dict[str, Any]:
        """The attention's part of the stock configuration."""
        config, fields = self.config, {}
        if self.norms is None:
            own = config.to_diff_dict()
            fields[MARKER] = {key: value for key, value in own.items() if key not in ("auto_map", "dtype")}
        return fields | {
            "num_key_value_heads": config.num_attention_heads,
            "kv_lora_rank": self.latent,
            "q_lora_rank": self.bottleneck,
            "qk_rope_head_dim": self.shape.rotary,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "v_head_dim": config.v_head_dim,
            "attention_bias": self.biased,
            "rope_parameters": self.rope,
            "rope_interleave": True,
        }

    def outward(self, headers: Mapping[str, TensorHeader]) -> Iterator[TargetTensor]:
        """All stock tensors, from the headers of ours and in their order."""
        begun = set()
        for name, header in headers.items():
            layer = layer_of(name)
            if ".self_attn." not in name:
                yield TargetTensor(name, header.shape, header.dtype, "copy", (Part(name),), (), layer)
            elif layer not in begun:
                begun.add(layer)
                assert layer is not None
                yield from self._attention(layer, headers)
            if name.endswith(".mlp.gate.weight"):
                yield from self._mixture(name.removesuffix("gate.weight"), headers)

    def _attention(self, layer: int, headers: Mapping[str, TensorHeader]) -> Iterator[TargetTensor]:
        config, prefix = self.config, f"model.layers.{layer}.self_attn."
        hidden = config.hidden_size
        yield from self._queries(layer, prefix, headers)
        norm, bias = f"{prefix}kv_a_layernorm.weight", f"{prefix}kv_a_proj_with_mqa.bias"
        places = self._latent_places(layer)
        size, arguments = self.latent + self.shape.rotary, {"latent": self.latent, **places}
        if self.norms is not None:
            arguments["scale"] = _calibrated_scale()
        name = f"{prefix}kv_a_proj_with_mqa.weight"
        yield self._make(name, (size, hidden), "stock_latent", [name], layer, headers, size=size, **arguments)
        if self.biased:
            own = [bias] if bias in headers else []
            yield self._make(
                bias, (size,), "latent_bias", own, layer, headers, size=size, constants=self.constants, **arguments
            )
        if config.kv_a_layernorm:
            yield self._make(norm, (self.latent,), "pad_norm", [norm], layer, headers, size=self.latent)
        else:
            value = _norm_scale() if self.norms is None else self.norms[layer]
            yield self._filled(norm, (self.latent,), layer, value)
        name = f"{prefix}kv_b_proj.weight"
        rows = headers[name].shape[0]
        yield self._make(name, (rows, self.latent), "pad_columns", [name], layer, headers, columns=self.latent)
        name, bias = f"{prefix}o_proj.weight", f"{prefix}o_proj.bias"
        yield self._make(name, headers[name].shape, "copy", [name], layer, headers)
        if bias in headers:
            yield self._make(bias, (hidden,), "copy", [bias], layer, headers)
        elif self.biased:
            yield self._filled(bias, (hidden,), layer, 0.0)

    def _queries(self, layer: int, prefix: str, headers: Mapping[str, TensorHeader]) -> Iterator[TargetTensor]:
        config, hidden = self.config, self.config.hidden_size
        arguments = self._query_places(layer) | {"scale": self.scale, "free_scale": self.free_scale}
        size, exact = self._query_size(), self.scale == self.free_scale == 1
        if not self.bottleneck:
            name = f"{prefix}q_proj.weight"
            yield self._make(
                name, (size, hidden), "stock_query", [name], layer, headers, exact, columns=hidden, **arguments
            )
            return
        first = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        width = self.queries[layer] if config.q_lora_rank is None else config.q_lora_rank
        zeros = [0.0] * (self.bottleneck - len(self.query_constants) - width)
        ends = [*zeros, *self.query_constants]
        for suffix, shape in (("weight", (self.bottleneck, hidden)), ("bias", (self.bottleneck,))):
            own, name = f"{prefix}{first}.{suffix}", f"{prefix}q_a_proj.{suffix}"
            values = ends if suffix == "bias" else [0.0] * len(ends)
            if own in headers:
                yield self._make(name, shape, "append_rows", [own], layer, headers, values=values)
            elif self.biased:
                values = [*[0.0] * width, *values]
                yield self._make(name, shape, "listed", [], layer, headers, values=values)
        norm = f"{prefix}q_a_layernorm.weight"
        if norm in headers:
            yield self._make(norm, (self.bottleneck,), "copy", [norm], layer, headers)
        else:
            yield self._filled(norm, (self.bottleneck,), layer, _norm_scale())
        name, shape = f"{prefix}q_b_proj.weight", (size, self.bottleneck)
        arguments["columns"] = self.bottleneck
        if config.q_lora_rank is None:
            yield self._make(name, shape, "select_query", [], layer, headers, exact, size=width, **arguments)
        else:
            yield self._make(name, shape, "stock_query", [name], layer, headers, exact, **arguments)

    def _mixture(self, prefix: str, headers: Mapping[str, TensorHeader]) -> Iterator[TargetTensor]:
        """What the stock mixture has besides: a selection bias, and a shared expert, which may be of zeros."""
        config, layer = self.config, layer_of(prefix)
        added: dict[str, tuple[str, tuple[int, ...]]] = {}
        if config.topk_method != "noaux_tc":
            added["gate.e_score_correction_bias"] = ("F32", (config.n_routed_experts,))
        if not config.shared_width:
            hidden, width = config.hidden_size, config.moe_intermediate_size
            for role in ("gate", "up", "down"):
                dtype = headers[f"{prefix}experts.0.{role}_proj.weight"].dtype
                shape: tuple[int, ...] = (hidden, width) if role == "down" else (width, hidden)
                added[f"shared_experts.{role}_proj.weight"] = (dtype, shape)
        for name, (dtype, shape) in added.items():
            arguments = (("shape", list(shape)), ("value", 0.0))
            yield TargetTensor(prefix + name, shape, dtype, "filled", (), arguments, layer)

    def inward(self, headers: Mapping[str, TensorHeader]) -> Iterator[TargetTensor]:
        """All of our tensors, from the headers of the stock ones and in their order."""
        begun = set()
        for name, header in headers.items():
            layer = layer_of(name)
            if ".self_attn." in name:
                if layer not in begun:
                    begun.add(layer)
                    assert layer is not None
                    yield from self._own_attention(layer, headers)
            elif not self._is_added(name):
                yield TargetTensor(name, header.shape, header.dtype, "copy", (Part(name),), (), layer)

    def _is_added(self, name: str) -> bool:
        if name.endswith(".e_score_correction_bias"):
            return self.config.topk_method != "noaux_tc"
        return ".shared_experts." in name and not self.config.shared_width

    def _own_attention(self, layer: int, headers: Mapping[str, TensorHeader]) -> Iterator[TargetTensor]:
        config, prefix, hidden = self.config, f"model.layers.{layer}.self_attn.", self.config.hidden_size
        rank, keys = self.shape.ranks[layer], config.num_key_value_heads * config.rotary_widths[layer]
        queries, arguments = self.queries[layer], self._query_places(layer)
        arguments |= {"scale": self.scale, "free_scale": self.free_scale}
        if config.q_lora_rank is None:
            name = f"{prefix}q_proj.weight"
            if self.bottleneck is None:
                yield self._own_query(name, (queries, hidden), layer, headers, **arguments)
            else:
                yield self._rows(name, f"{prefix}q_a_proj.weight", queries, layer, headers)
                yield self._rows(f"{prefix}q_proj.bias", f"{prefix}q_a_proj.bias", queries, layer, headers)
        else:
            width = config.q_lora_rank
            for name in ("q_a_proj.weight", *(["q_a_proj.bias"] if config.q_bias else [])):
                yield self._rows(prefix + name, prefix + name, width, layer, headers)
            if config.q_a_layernorm:
                name = f"{prefix}q_a_layernorm.weight"
                yield self._rows(name, name, width, layer, headers)
            name = f"{prefix}q_b_proj.weight"
            yield self._own_query(name, (queries, width), layer, headers, **arguments)
        places = self._latent_places(layer) | {"latent": self.latent}
        for suffix, shape in (("weight", (rank + keys, hidden)), ("bias", (rank + keys,))):
            name = f"{prefix}kv_a_proj_with_mqa.{suffix}"
            if suffix == "weight" or config.kv_bias:
                yield self._make(name, shape, "own_latent", [name], layer, headers, **places)
        if config.kv_a_layernorm:
            name = f"{prefix}kv_a_layernorm.weight"
            yield self._make(name, (rank,), "own_norm", [name], layer, headers, size=rank)
        name = f"{prefix}kv_b_proj.weight"
        shape = (headers[name].shape[0], rank)
        yield self._make(name, shape, "columns", [name], layer, headers, start=0, stop=rank, scale=1.0)
        for name in ("o_proj.weight", *(["o_proj.bias"] if config.o_bias else [])):
            yield self._rows(prefix + name, prefix + name, hidden, layer, headers)

    def _own_query(
        self, name: str, shape: tuple[int, ...], layer: int, headers: Mapping[str, TensorHeader], **arguments: Any
    ) -> TargetTensor:
        made = self._make(name, shape, "own_query", [name], layer, headers, columns=shape[1], **arguments)
        # What was scaled on the way out was written in float32, whatever it had been.
        return made if self.scale == self.free_scale == 1 else replace(made, dtype=self.dtype)

    def _query_size(self) -> int:
        return self.config.num_attention_heads * (self.config.qk_nope_head_dim + self.shape.rotary)

    def _query_places(self, layer: int) -> dict[str, Any]:
        return {"heads": self.shape.heads, "nope": self.shape.nope, **self._key_places(layer)}

    def _latent_places(self, layer: int) -> dict[str, Any]:
        return {"rank": self.shape.ranks[layer], **self._key_places(layer)}

    def _key_places(self, layer: int) -> dict[str, Any]:
        pairs, union = list(self.shape.pairs[layer]), len(self.shape.union)
        return {"groups": self.shape.groups, "pairs": pairs, "union": union, "interleave": self.shape.interleave}

    def _rows(self, name: str, theirs: str, rows: int, layer: int, headers: Mapping[str, TensorHeader]) -> TargetTensor:
        header = headers[theirs]
        part = Part(theirs) if rows == header.shape[0] else Part(theirs, 0, rows)
        return TargetTensor(name, (rows, *header.shape[1:]), header.dtype, "copy", (part,), (), layer)

    def _filled(self, name: str, shape: tuple[int, ...], layer: int, value: float) -> TargetTensor:
        arguments = (("shape", list(shape)), ("value", value))
        return TargetTensor(name, shape, self.dtype, "filled", (), arguments, layer)

    def _make(
        self,
        name: str,
        shape: tuple[int, ...],
        rule: str,
        parts: list[str],
        layer: int,
        headers: Mapping[str, TensorHeader],
        exact: bool = True,
        **arguments: Any,
    ) -> TargetTensor:
        # A scaled number of 16 bits is none of 16 bits.
        dtype = (headers[parts[0]].dtype if parts else self.dtype) if exact else "F32"
        sources = tuple(Part(part) for part in parts)
        return TargetTensor(name, shape, dtype, rule, sources, tuple(sorted(arguments.items())), layer)


def _calibrated_scale() -> float:
    from .deepseek import CALIBRATED_SCALE

    return CALIBRATED_SCALE


def _norm_scale() -> float:
    from .deepseek import NORM_SCALE

    return NORM_SCALE


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def experts_alike(source: FolderSource, config: Any) -> bool:
    """Whether every router chooses among copies of one expert, so that normalised weights say nothing.

    Cost: reads and hashes all experts.
    """
    if not config.norm_topk_prob:
        return False
    for layer, kind in enumerate(config.mlp_layer_types):
        if kind == "sparse":
            prefix = f"model.layers.{layer}.mlp.experts."
            if len({_digest(source, f"{prefix}{expert}.") for expert in range(config.n_routed_experts)}) > 1:
                return False
    return True


def is_unchanged(source: FolderSource, layout: StockLayout, tensors: list[TargetTensor]) -> bool:
    """Whether a stock folder is what its own form gives: nothing was trained where zeros and constants stand.

    Args:
        tensors: ours, as `layout.inward` lists them.
    """
    import torch

    from .stream import apply_rule

    made = {tensor.name: tensor for tensor in tensors}
    headers = {t.name: TensorHeader(t.dtype, t.shape, source.path, 0, t.nbytes) for t in tensors}

    def read(part: Part) -> torch.Tensor:
        return source.read(part.name, part.start, part.stop)

    for tensor in layout.outward(headers):
        if tensor.rule == "copy" and made[tensor.parts[0].name].rule == "copy":
            continue
        inputs = [apply_rule(made[part.name], [read(p) for p in made[part.name].parts]) for part in tensor.parts]
        if tensor.name not in source.headers or not torch.equal(apply_rule(tensor, inputs), read(Part(tensor.name))):
            return False
    routers = layout.config.scoring_func == "softmax" and "sparse" in layout.config.mlp_layer_types
    return not routers or experts_alike(source, layout.config)


def _digest(source: FolderSource, prefix: str) -> str:
    from .stream import as_bytes

    digest = sha256()
    for name in ("gate_proj", "up_proj", "down_proj"):
        digest.update(as_bytes(source.read(f"{prefix}{name}.weight")))
    return digest.hexdigest()
