"""The language model inside of a model of more than text, such as Gemma 3 with its eyes.

The configuration's `text_config` names a dense family, and its tensors stand under a prefix. The rest is left out, by
name: what a picture would be turned into never reaches the language model's own tensors.
"""

from collections.abc import Mapping
from typing import Any

from .families import FAMILIES
from .headers import TensorHeader

# Prefix in the wrapper's files → prefix in the language model's own.
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_config(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the language model inside, if it is of a family of the table; None of anything else."""
    inner = raw.get("text_config")
    if not isinstance(inner, dict) or raw.get("model_type") in FAMILIES or inner.get("model_type") not in FAMILIES:
        return None
    outer = {name: raw[name] for name in (*_TOKENS, "quantization_config", "dtype", "torch_dtype") if name in raw}
    return {**outer, **inner}


def text_headers(stored: Mapping[str, TensorHeader]) -> tuple[dict[str, TensorHeader], list[str]]:
    """Headers of the language model by its own names, and the modules that are left out."""
    found, left = {}, set()
    for name, header in stored.items():
        prefix = next((each for each in _PREFIXES if name.startswith(each)), None)
        if prefix is None:
            left.add(".".join(name.removeprefix("model.").split(".")[:1]))
        else:
            found[_PREFIXES[prefix] + name.removeprefix(prefix)] = header
    return found, sorted(left)


def language_model(
    raw: dict[str, Any], stored: dict[str, TensorHeader]
) -> tuple[dict[str, Any], dict[str, TensorHeader], list[str]]:
    """Configuration, headers and what is left out: of a wrapper those of its language model, else all as it is."""
    inner = text_config(raw)
    if inner is None:
        return raw, stored, []
    headers, left = text_headers(stored)
    # Wrappers write this option at either level, or at both and not the same; the files know.
    return inner | {"tie_word_embeddings": "lm_head.weight" not in headers}, headers, left
