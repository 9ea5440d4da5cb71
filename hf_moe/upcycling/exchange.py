"""Export to Transformers' own mixtures and back: the same numbers under other names.

v_proj, k_proj  ⇄  rows of kv_a_proj_with_mqa          kv_b_proj is the constant selection of heads, so it is
                                                        checked on the way out and made again on the way in
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .card import write_exchange_card
from .convert import PROVENANCE_NAME, build, check_target, copy_model_files, copy_tokenizer, provenance, target_config
from .deepseek_layout import MARKER, StockLayout, experts_alike, is_unchanged
from .export_measures import measure_latent_norms
from .families import Part, check_activation
from .formats import ENGINES, MIXTURES, Format, Mixture, format_of
from .headers import INDEX_NAME
from .journal import Journal
from .mixture_source import MixtureSource
from .options import Options
from .plan import DTYPE_NAMES, Plan, TargetTensor, pack

LATENT_NORMS = ("constant", "calibrated")


def export(
    folder: str | Path,
    out: str | Path,
    to: str,
    *,
    engine: str = "transformers",
    latent_norm: str = "constant",
    progress: bool = True,
) -> Path:
    """Write a model of ours as one of Transformers' own classes, which then needs nothing of this package.

    Args:
        folder: an hf_moe model. to: a key of `FORMATS`. engine: who will serve it, "transformers", "vllm" or "sglang".
        latent_norm: how latents without norm stand the norm of DeepSeek-V3: "constant", undone by a constant beside
            them, exact; "calibrated", near to it on text, not exact, and without the bias that a constant needs.
    Returns:
        `out`, which appears when it is complete and is continued when a run was interrupted.
    Raises:
        ValueError: the class, or the engine's reading of it, would compute something else; the reason is named.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    if latent_norm not in LATENT_NORMS:
        raise ValueError(f"unknown latent_norm {latent_norm!r}; known are {', '.join(LATENT_NORMS)}")
    target, source, layout = check_target(out), MixtureSource(str(folder)), format_of(to)
    if source.model_type != "hf_moe":
        raise ValueError(f"{folder} holds a {source.model_type!r} model; export starts from hf_moe")
    used: dict[str, Any] = dict(source.config)
    if layout.latent and used["scoring_func"] == "softmax":
        # It reads all experts, so only where the answer decides.
        used["experts_alike"] = experts_alike(source, _configuration("hf_moe", used))
    calibrated = latent_norm == "calibrated" and layout.latent and not used["kv_a_layernorm"]
    if calibrated:
        # The latent is scaled so that no epsilon matters.
        used |= {"kv_a_layernorm": True, "latent_norm_eps": 1e-6, "rms_norm_eps": 1e-6}
    if obstacle := layout.obstacle(used, engine):
        raise ValueError(f"{source.title} cannot be exported: {obstacle}")
    fields = layout.fields(source.config) | {"architectures": [layout.architecture], "model_type": layout.model_type}
    if layout.latent:
        norms = measure_latent_norms(source, progress) if calibrated else None
        stock = _stock_layout(source, norms)
        fields |= stock.fields()
        tensors = list(stock.outward(source.headers))
    else:
        _check_selection(source)
        tensors = [_copy(source, theirs, part) for theirs, part in _outward(source, layout)]
    return _write(source, target, layout.model_type, fields, tensors, progress)


def import_mixture(folder: str | Path, out: str | Path, *, progress: bool = True) -> Path:
    """Read a Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek-V3 folder or Hub id as a model of ours: latents, exact.

    Raises:
        ValueError: another architecture, or an option that the target cannot hold.
    """
    target, source = check_target(out), MixtureSource(str(folder))
    if source.model_type == "hf_moe":
        raise ValueError(f"{folder} holds an 'hf_moe' model already")
    layout = MIXTURES[str(source.model_type)]
    if own := own_form(source):
        fields, tensors = own
    else:
        fields = _inward_fields(source, layout)
        tensors = list(_inward(source, layout, fields))
    check_activation(fields["hidden_act"])
    return _write(source, target, "hf_moe", fields, tensors, progress)


def _stock_layout(source: MixtureSource, norms: list[float] | None) -> StockLayout:
    dtype = source.headers["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].dtype
    return StockLayout(_configuration("hf_moe", dict(source.config)), dtype, norms)


def own_form(source: MixtureSource) -> tuple[dict[str, Any], list[TargetTensor]] | None:
    """The model that `export` wrote as DeepSeek-V3, where its zeros and constants are still what they were.

    Cost: reads the attention, and all experts where the router is of the softmax kind.
    """
    if MARKER not in source.config:
        return None
    fields = dict(source.config[MARKER])
    config = _configuration("hf_moe", fields)
    dtype = source.headers["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].dtype
    stock = StockLayout(config, dtype)
    tensors = list(stock.inward(source.headers))
    return (fields, tensors) if is_unchanged(source, stock, tensors) else None


def _check_selection(source: MixtureSource) -> None:
    import torch

    from .latent import select_groups

    c = source.config
    expected = select_groups(
        heads=c["num_attention_heads"], groups=c["num_key_value_heads"], nope=0, value=c["v_head_dim"], scale=1.0
    )
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        if not torch.equal(source.read(name).float(), expected):
            raise ValueError(
                f"{source.title} cannot be exported: {name} is no longer the selection of value heads (it was "
                "trained), and grouped-query attention has nothing in its place"
            )


def _outward(source: MixtureSource, layout: Format) -> Iterator[tuple[str, Part]]:
    """Their name and our part, in the order of our files' headers, of a class with grouped-query attention."""
    latent = source.config["kv_lora_rank"]
    for name, header in source.headers.items():
        if ".kv_a_proj_with_mqa." in name:
            yield name.replace("kv_a_proj_with_mqa", "v_proj"), Part(name, 0, latent)
            yield name.replace("kv_a_proj_with_mqa", "k_proj"), Part(name, latent, header.shape[0])
        elif ".kv_b_proj." not in name:
            yield _renamed(name, layout), Part(name)


def _renamed(name: str, layout: Format) -> str:
    """Our name of a part of the mixture in their words."""
    if ".mlp.gate." in name:
        return name.replace(".mlp.", f".{layout.block}.")
    if ".mlp.experts." in name:
        stem, projection, suffix = name.rsplit(".", 2)
        return f"{stem.replace('.mlp.', f'.{layout.block}.')}.{layout.experts[projection]}.{suffix}"
    return name


def _inward(source: MixtureSource, layout: Mixture, fields: dict[str, Any]) -> Iterator[TargetTensor]:
    """Our tensors, in the order of their files' headers."""
    back = {theirs: ours for ours, theirs in layout.experts.items()}
    shape = {"groups": fields["num_key_value_heads"], "nope": 0}
    heads = {"heads": fields["num_attention_heads"], **shape, "value": fields["v_head_dim"], "scale": 1.0}
    for name, header in source.headers.items():
        ours = name.replace(f".{layout.block}.", ".mlp.").replace(f".{layout.shared}.", ".shared_experts.")
        if layout.block != "mlp" and ".experts." in ours:
            stem, projection, suffix = ours.rsplit(".", 2)
            ours = f"{stem}.{back[projection]}.{suffix}"
        if layout.latent or ".self_attn." not in name or ".q_proj." in name:
            yield _copy(source, ours, Part(name))
        elif name.endswith(".bias"):
            yield from _inward_bias(source, name, fields)
        elif name.endswith("v_proj.weight"):
            key = name.replace("v_proj", "k_proj")
            rows = header.shape[0] + source.headers[key].shape[0]
            yield TargetTensor(
                ours.replace("v_proj", "kv_a_proj_with_mqa"),
                (rows, header.shape[1]),
                header.dtype,
                "latent_and_keys",
                (Part(name), Part(key)),
                tuple(sorted(shape.items())),
                _layer(name),
            )
            yield TargetTensor(
                ours.replace("v_proj", "kv_b_proj"),
                (fields["num_attention_heads"] * fields["v_head_dim"], fields["kv_lora_rank"]),
                header.dtype,
                "select_groups",
                (),
                tuple(sorted(heads.items())),
                _layer(name),
            )
        elif not name.endswith("k_proj.weight"):
            yield _copy(source, ours, Part(name))


def _inward_bias(source: MixtureSource, name: str, fields: dict[str, Any]) -> Iterator[TargetTensor]:
    """Key bias: that of the rotary keys. Output bias: the sum of its own and the values', which have none of their own.

    In float32, since a sum of two numbers of 16 bits is none.
    """
    prefix, projection, _ = name.rsplit(".", 2)
    groups, hidden = fields["num_key_value_heads"], fields["hidden_size"]
    if projection == "k_proj":
        shape = {"groups": groups, "nope": 0, "value": fields["v_head_dim"]}
        size = fields["kv_lora_rank"] + groups * fields["qk_rope_head_dim"]
        target = f"{prefix}.kv_a_proj_with_mqa.bias"
        arguments, dtype = tuple(sorted(shape.items())), source.headers[name].dtype
        yield TargetTensor(target, (size,), dtype, "key_bias", (Part(name),), arguments, _layer(name))
    elif projection == "v_proj":
        heads = {"heads": fields["num_attention_heads"], "groups": groups, "scale": 1.0}
        own = f"{prefix}.o_proj.bias"
        parts = [Part(own)] if own in source.headers else []
        parts += [Part(f"{prefix}.o_proj.weight"), Part(name)]
        arguments = tuple(sorted(heads.items()))
        yield TargetTensor(own, (hidden,), "F32", "output_bias", tuple(parts), arguments, _layer(name))
    elif f"{prefix}.v_proj.bias" not in source.headers:
        yield _copy(source, name, Part(name))


def _inward_fields(source: MixtureSource, layout: Mixture) -> dict[str, Any]:
    """Our configuration of theirs.

    Raises:
        ValueError: an option that ours cannot hold.
    """
    theirs = source.config
    if theirs.get("clip_qkv") is not None:
        raise ValueError(f"clip_qkv={theirs['clip_qkv']} of a {layout.model_type} model has no equal here, only None")
    if layout.latent:
        from ..model.translation_hf_moe import translate

        return translate(theirs) | {"architectures": ["HfMoeForCausalLM"]}
    if packing := theirs.get("quantization_config"):
        raise ValueError(
            f"{source.title} is quantised by {packing.get('quant_method')!r}, and import copies plain numbers only: "
            "dequantise it first, or import the model that it was made of"
        )
    width = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    mixtral = layout.model_type == "mixtral"
    biased = {role: any(name.endswith(f"{role}_proj.bias") for name in source.headers) for role in "qkvo"}
    step = theirs.get("decoder_sparse_step") or 1
    dense = set(theirs.get("mlp_only_layers") or ())
    layers = range(theirs["num_hidden_layers"])
    window = theirs.get("sliding_window") if mixtral or theirs.get("use_sliding_window") else None
    shared = theirs.get("shared_expert_intermediate_size")
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings pad_token_id"
    names += " bos_token_id eos_token_id rope_parameters num_experts_per_tok router_aux_loss_coef dtype"
    return {name: theirs.get(name) for name in names.split()} | {
        "architectures": ["HfMoeForCausalLM"],
        "kv_lora_rank": theirs["num_key_value_heads"] * width,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": width,
        "v_head_dim": width,
        "kv_a_layernorm": False,
        "qk_norm": layout.qk_norm,
        "q_bias": biased["q"],
        "kv_bias": biased["k"],
        "o_bias": biased["o"] or biased["v"],
        "layer_types": theirs.get("layer_types"),
        "sliding_window": window,
        "moe_intermediate_size": theirs.get("moe_intermediate_size") or theirs["intermediate_size"],
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": bool(shared),
        "n_routed_experts": theirs.get("num_local_experts") or theirs["num_experts"],
        "norm_topk_prob": True if mixtral else theirs["norm_topk_prob"],
        "mlp_layer_types": ["dense" if i in dense or (i + 1) % step else "sparse" for i in layers],
    }


def _copy(source: MixtureSource, name: str, part: Part) -> TargetTensor:
    header = source.headers[part.name]
    shape = header.shape if part.stop is None else (part.stop - part.start, *header.shape[1:])
    return TargetTensor(name, shape, header.dtype, "copy", (part,), (), _layer(name))


def _layer(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _write(
    source: MixtureSource, target: Path, kind: str, fields: dict[str, Any], tensors: list[TargetTensor], progress: bool
) -> Path:
    # A dtype by name: configurations carry torch's own objects.
    fields["dtype"] = str(fields.get("dtype") or DTYPE_NAMES[tensors[0].dtype]).removeprefix("torch.")
    options = Options()
    plan = Plan(source.location, None, str(source.model_type), options, fields, pack(tensors, options))
    # Refuses, before anything is written, what the model could not be built from.
    config = _configuration(kind, fields)

    def finish(plan: Plan, folder: Path, journal: Journal) -> None:
        (folder / INDEX_NAME).write_text(json.dumps(plan.index(), indent=1) + "\n", encoding="utf-8")
        config.save_pretrained(folder)
        if kind == "hf_moe":
            copy_model_files(folder)
        copy_tokenizer(source, folder)
        write_exchange_card(source, kind, folder)
        record = provenance(plan, source, folder, journal) | {"conversion": [str(source.model_type), kind]}
        # Those of an upcycling say nothing here.
        del record["options"]
        (folder / PROVENANCE_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    return build(plan, source, target, plan.digest(source.fingerprint()), finish, progress)


def _configuration(kind: str, fields: dict[str, Any]) -> Any:
    """The configuration object of a model type."""
    from transformers import AutoConfig

    if kind == "hf_moe":
        return target_config(fields)
    return AutoConfig.for_model(kind, **{key: value for key, value in fields.items() if key != "model_type"})
