"""A model loaded whole in fp32 on the CPU, and what it does with a text.

Letters: S tokens read, V vocabulary.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers

from .calibration import default_text
from .progress import step_bar
from .sources import Source, holds_tokenizer

_CHUNK = 256


@dataclass(frozen=True)
class Run:
    """What one model did with the text: fp32 on the CPU.

    logits: (S, V). greedy: ids that follow the prompt. cached: logits of those steps from the cache, (steps, V).
    uncached: the same from one pass without a cache. loss: mean cross-entropy of the text.
    """

    logits: torch.Tensor
    greedy: list[int]
    cached: torch.Tensor
    uncached: torch.Tensor
    loss: float


def token_ids(source: Source, folder: Path, text: str | None, tokens: int) -> tuple[torch.Tensor, str]:
    """Ids (1, S) of the text, and a description of it; random ids where the source has no tokenizer.

    Raises:
        ValueError: the text has fewer tokens than asked for, or cannot be read without a tokenizer.
    """
    if not holds_tokenizer(folder):
        if text is not None:
            raise ValueError(f"{folder} has no tokenizer, so the text cannot be read")
        random = torch.Generator().manual_seed(0)
        return torch.randint(source.config["vocab_size"], (1, tokens), generator=random), "random tokens, seed 0"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    description = "given text"
    if text is None:
        text, description = default_text(), f"Python {platform.python_version()} language reference (pydoc_data.topics)"
    # A token is at least one byte; the factor keeps a long text from being tokenised whole.
    ids = tokenizer(text[: tokens * 32], return_tensors="pt", truncation=False, verbose=False)["input_ids"]
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens, {tokens} are needed")
    return ids[:, :tokens], description


def load_source(source: Source) -> Any:
    """The dense model in fp32, by Transformers; what it would load otherwise, from what this package reads."""
    if source.foreign:
        plain = {key: value for key, value in source.config.items() if key not in ("quantization_config", "dtype")}
        config = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {name: source.read(name).float() for name in source.headers}
        if lost := set(model.load_state_dict(state, strict=False).missing_keys) - set(model._tied_weights_keys or ()):
            raise ValueError(f"{min(lost)} is missing from the source")
        return model.eval()
    arguments = source.load_arguments()
    if "gguf_file" in arguments:
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        # Its bar for the tensors knows no switch.
        with redirect_stderr(StringIO()):
            return transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32).eval()


def load_target(folder: Path) -> Any:
    """The converted model in fp32, by this package.

    Raises:
        ValueError: a folder whose weights are not those of its configuration.
    """
    from ..model import HfMoeForCausalLM

    try:
        return HfMoeForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    except RuntimeError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def fixed_length(config: dict[str, Any]) -> int | None:
    """Up to how many tokens a model's rope stays the same; None where it always does."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(original or config["max_position_embeddings"])


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, new_tokens: int, fixed: int | None, description: str, progress: bool) -> Run:
    """Read `ids` (1, S), then continue the first of them greedily.

    Args:
        fixed: how many tokens that may be in all: keys that were cached before a rope changes do not fit behind it.
    """
    if fixed is not None:
        new_tokens = min(new_tokens, fixed)
    # The last new token is not read.
    prompt = ids[:, : min(64, ids.shape[1], fixed + 1 - new_tokens if fixed else 64)]
    with step_bar(description, ids.shape[1] + new_tokens, progress) as advance:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = torch.cat([_logits(model, chunk, advance) for chunk in hidden.split(_CHUNK, dim=1)])
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()

        steps, current, cache = [], prompt, None
        for _ in range(new_tokens):
            output = model(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            steps.append(output.logits[0, -1])
            current = steps[-1].argmax()[None, None]
            advance(1)
        greedy = [int(step.argmax()) for step in steps]
        whole = torch.cat([prompt, torch.tensor([greedy[:-1]], dtype=prompt.dtype)], dim=1)
        uncached = model(input_ids=whole, use_cache=False, logits_to_keep=new_tokens).logits[0]
    return Run(logits, greedy, torch.stack(steps), uncached, loss)


def _logits(model: Any, hidden: torch.Tensor, advance: Any) -> torch.Tensor:
    config = model.config
    logits = model.lm_head(hidden)[0] / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    advance(hidden.shape[1])
    return logits if cap is None else torch.tanh(logits / cap) * cap


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Transformers' own bars for loading would stand between ours."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
