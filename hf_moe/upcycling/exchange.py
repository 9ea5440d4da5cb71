"""Export to Transformers' own mixtures and back: the same numbers under other names.

v_proj, k_proj  ⇄  rows of kv_a_proj_with_mqa          kv_b_proj is the constant selection of heads, so it is
                                                        checked on the way out and made again on the way in
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .convert import build, check_target, copy_tokenizer
from .families import Part
from .formats import ENGINES, FORMATS, Format, format_of
from .headers import INDEX_NAME, read_folder
from .options import Options
from .plan import DTYPE_NAMES, Plan, TargetTensor, pack
from .sources import FolderSource, filled_in, read_config


class MixtureSource(FolderSource):
    """A folder that holds a mixture already: ours, or one of `FORMATS`."""

    def __init__(self, path: Path):
        # Not FolderSource's: that one wants a dense family.
        super(FolderSource, self).__init__(str(path), path)
        raw = read_config(path)
        self.model_type = raw.get("model_type")
        if self.model_type != "hf_moe" and self.model_type not in FORMATS:
            known = ", ".join(["hf_moe", *FORMATS])
            raise ValueError(f"{path} holds a {self.model_type!r} model; known are {known}")
        self.config = filled_in(raw)
        self.headers = self._stored = read_folder(path)
        self._scales, self._block = {}, None


def export(
    folder: str | Path, out: str | Path, to: str, *, engine: str = "transformers", progress: bool = True
) -> Path:
    """Write a model of ours as one of Transformers' own classes, which then needs nothing of this package.

    Args:
        folder: an hf_moe model. to: a key of `FORMATS`. engine: who will serve it, "transformers", "vllm" or "sglang".
    Returns:
        `out`, which appears when it is complete and is continued when a run was interrupted.
    Raises:
        ValueError: the class, or the engine's reading of it, would compute something else; the reason is named.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    target, source, layout = check_target(out), MixtureSource(Path(folder).expanduser()), format_of(to)
    if source.model_type != "hf_moe":
        raise ValueError(f"{folder} holds a {source.model_type!r} model; export starts from hf_moe")
    if obstacle := layout.obstacle(source.config, engine):
        raise ValueError(f"{source.title} cannot be exported: {obstacle}")
    if "grouped-query attention" in layout.needs:
        _check_selection(source)
    fields = layout.fields(source.config) | {"architectures": [layout.architecture], "model_type": layout.model_type}
    tensors = [_copy(source, theirs, part) for theirs, part in _outward(source, layout)]
    return _write(source, target, layout.model_type, fields, tensors, progress)


def import_mixture(folder: str | Path, out: str | Path, *, progress: bool = True) -> Path:
    """Read a Mixtral, Qwen3-MoE or DeepSeek-V3 folder as a model of ours: latents, exact.

    Raises:
        ValueError: another architecture, or an option that the target cannot hold.
    """
    target, source = check_target(out), MixtureSource(Path(folder).expanduser())
    layout = format_of(str(source.model_type))
    fields = _inward_fields(source.config)
    tensors = list(_inward(source, layout, fields))
    return _write(source, target, "hf_moe", fields, tensors, progress)


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
    """Their name and our part, in the order of our files' headers."""
    latent = source.config["kv_lora_rank"]
    grouped = "grouped-query attention" in layout.needs
    for name, header in source.headers.items():
        if grouped and ".kv_a_proj_with_mqa." in name:
            yield name.replace("kv_a_proj_with_mqa", "v_proj"), Part(name, 0, latent)
            yield name.replace("kv_a_proj_with_mqa", "k_proj"), Part(name, latent, header.shape[0])
        elif not (grouped and ".kv_b_proj." in name):
            yield _renamed(name, layout), Part(name)


def _renamed(name: str, layout: Format) -> str:
    """Our name of a part of the mixture in their words."""
    if ".mlp.gate." in name:
        return name.replace(".mlp.", f".{layout.block}.")
    if ".mlp.experts." in name:
        stem, projection, suffix = name.rsplit(".", 2)
        return f"{stem.replace('.mlp.', f'.{layout.block}.')}.{layout.experts[projection]}.{suffix}"
    return name


def _inward(source: MixtureSource, layout: Format, fields: dict[str, Any]) -> Iterator[TargetTensor]:
    """Our tensors, in the order of their files' headers."""
    back = {theirs: ours for ours, theirs in layout.experts.items()}
    shape = {"groups": fields["num_key_value_heads"], "nope": 0}
    heads = {"heads": fields["num_attention_heads"], **shape, "value": fields["v_head_dim"], "scale": 1.0}
    for name, header in source.headers.items():
        ours = name.replace(f".{layout.block}.", ".mlp.")
        if layout.block != "mlp" and ".experts." in ours:
            stem, projection, suffix = ours.rsplit(".", 2)
            ours = f"{stem}.{back[projection]}.{suffix}"
        if "latent attention" in layout.needs or ".self_attn." not in name:
            yield _copy(source, ours, Part(name))
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
            if name.endswith(".bias"):
                raise ValueError(f"{name}: biases of a {source.model_type} model cannot be imported")
            yield _copy(source, ours, Part(name))


def _inward_fields(theirs: dict[str, Any]) -> dict[str, Any]:
    """Our configuration of theirs."""
    if theirs["model_type"] == "deepseek_v3":
        from ..model.translation_hf_moe import translate

        return translate(theirs) | {"architectures": ["HfMoeForCausalLM"]}
    width = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    mixtral = theirs["model_type"] == "mixtral"
    step = theirs.get("decoder_sparse_step") or 1
    dense = set(theirs.get("mlp_only_layers") or ())
    layers = range(theirs["num_hidden_layers"])
    window = theirs.get("sliding_window") if mixtral or theirs.get("use_sliding_window") else None
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
        "qk_norm": None if mixtral else "head",
        "sliding_window": window,
        "moe_intermediate_size": theirs["intermediate_size"] if mixtral else theirs["moe_intermediate_size"],
        "n_routed_experts": theirs["num_local_experts"],
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

    def finish(folder: Path, _: Any) -> None:
        from transformers import AutoConfig

        from ..model.configuration_hf_moe import HfMoeConfig
        from .convert import copy_model_files

        (folder / INDEX_NAME).write_text(json.dumps(plan.index(), indent=1) + "\n", encoding="utf-8")
        if kind == "hf_moe":
            HfMoeConfig(**fields).save_pretrained(folder)
            copy_model_files(folder)
        else:
            rest = {key: value for key, value in fields.items() if key != "model_type"}
            AutoConfig.for_model(kind, **rest).save_pretrained(folder)
        copy_tokenizer(source, folder)

    return build(plan, source, target, plan.digest(source.fingerprint()), finish, progress)
