"""Proof that a conversion lost nothing: bytes against the plan, logits and decoding against the source.

Letters: S tokens compared, V vocabulary.
"""

import gc
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from .calibration import CALIBRATION_NAME, CalibratedSource, default_text, needs_experts
from .card import add_measurements
from .convert import PROVENANCE_NAME, learnt_plan
from .headers import read_folder
from .learnt_attention import ATTENTION_NAME
from .ledger import LEDGER_NAME
from .options import EXACT_MODES, Options
from .plan import Plan
from .progress import byte_bar, step_bar
from .sources import Source, open_source
from .stream import ahead, hash_bytes, produce

CERTIFICATE_NAME = "certificate.json"
_CHUNK = 256


class VerificationError(ValueError):
    """The target is not what it should be; the message names the first difference, the certificate all of them."""


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


def verify(
    source: str | Path | list[str | Path],
    target: str | Path,
    *,
    text: str | None = None,
    tokens: int = 2048,
    new_tokens: int = 64,
    tolerance: float = 1e-4,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare a converted folder with its source and write `certificate.json` into it.

    Bytes: every tensor is computed again from the source and must equal the file; every other file must have the hash
    that was recorded. Numbers, in fp32: logits of `tokens` tokens, `new_tokens` greedy tokens, and decoding with a
    cache against one pass without. Of inexact modes and attention only the last can fail, with 100 times the
    tolerance; the rest is measured.

    Args:
        text: what the models read; by default the Python language reference that comes with the interpreter. Without
            a tokenizer the tokens are random.
        tokens: at least 2; of a source with fewer positions, so many. new_tokens: at least 1; where the rope changes
            with the length, prompt and new tokens stay below.
        tolerance: largest |Δlogit| that passes.
    Returns:
        The certificate.
    Raises:
        VerificationError: a byte or a number is off. ValueError: a folder that was not made by `upcycle`, a text that
            is too short, or too few tokens.
    Cost: both models in fp32, one after the other; S·V·8 bytes for the logits.
    """
    opened, folder = open_source(source), Path(target).expanduser()
    tokens = min(tokens, opened.config.get("max_position_embeddings") or tokens)
    if tokens < 2 or new_tokens < 1:
        # A loss needs a next token.
        raise ValueError(f"tokens={tokens} must be at least 2 and new_tokens={new_tokens} at least 1")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    record = read_record(folder)
    failures = _check_bytes(opened, folder, record, progress)
    certificate: dict[str, Any] = {"passed": False, "failures": failures, "source": opened.title}
    certificate |= {"revision": opened.revision, "options": record.options.to_dict()}
    if not failures:
        exact = record.options.mode in EXACT_MODES and record.options.attention == "exact"
        measured = _compare(opened, folder, text, tokens, new_tokens, progress)
        certificate |= measured
        failures += _judge(measured, tolerance, exact)
    certificate |= {
        "tolerance": tolerance,
        "passed": not failures,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "tensors": record.tensors,
    }
    add_measurements(folder, certificate)
    path = folder / CERTIFICATE_NAME
    path.write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
    if failures:
        raise VerificationError(f"{folder.name} fails: {failures[0]}" + _and_more(failures))
    return certificate


def _and_more(failures: list[str]) -> str:
    return f" (and {len(failures) - 1} more, see {CERTIFICATE_NAME})" if len(failures) > 1 else ""


@dataclass(frozen=True)
class Record:
    """What `provenance.json` says: the choices, file → hash, tensor → hash, and the entries of all tensors."""

    options: Options
    files: dict[str, str]
    hashes: dict[str, str]
    tensors: list[dict[str, Any]]


def read_record(folder: Path) -> Record:
    """Read `provenance.json`.

    Raises:
        ValueError: there is none, or it is not what `upcycle` writes.
    """
    path = folder / PROVENANCE_NAME
    if not path.is_file() or '"conversion"' in path.read_text(encoding="utf-8"):
        raise ValueError(
            f"{folder} holds no {PROVENANCE_NAME}, so nobody can say which bytes of a source made it: only what hf-moe "
            "upcycle wrote can be verified, not a model that was exported, imported or trained further"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        choices = content["options"]
        lists = {"dense_layers": tuple(choices["dense_layers"]), "calibration": tuple(choices.get("calibration", ()))}
        options = Options(**{**choices, **lists})
        hashes = {tensor["name"]: tensor["sha256"] for tensor in content["tensors"]}
        return Record(options, dict(content["files"]), hashes, content["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, hf-moe upcycle wrote something else: {error!r}") from error


def _check_bytes(source: Source, folder: Path, record: Record, progress: bool) -> list[str]:
    plan = learnt_plan(source, record.options, folder)
    failures = []
    for name, digest in record.files.items():
        if not (folder / name).is_file():
            failures.append(f"{name} is missing")
        elif sha256((folder / name).read_bytes()).hexdigest() != digest:
            failures.append(f"{name} has changed since it was written")
    try:
        read_folder(folder)
    except ValueError as error:
        return [*failures, str(error)]
    if record.options.reads_text:
        needed = {CALIBRATION_NAME} if needs_experts(record.options) else set()
        needed |= {ATTENTION_NAME, LEDGER_NAME} if record.options.attention == "compress" else set()
        if failures or not needed <= record.files.keys():
            return [*failures, f"{min(needed)} is not what {PROVENANCE_NAME} says"]
        source = CalibratedSource(source, folder)
    with byte_bar("checking weights", plan.nbytes, progress) as advance:
        failures += list(_differing(plan, source, folder, record, advance))
    return failures


def _differing(plan: Plan, source: Source, folder: Path, record: Record, advance: Any) -> Iterator[str]:
    stream = ahead(produce(source, plan.tensors()))
    for shard in plan.shards:
        if not (folder / shard.file).is_file():
            yield f"{shard.file} is missing"
            return
        with (folder / shard.file).open("rb") as file:
            if file.read(len(shard.header)) != shard.header:
                yield f"the header of {shard.file} is not that of the plan"
                return
            for tensor in shard.tensors:
                produced = next(stream)
                sha256, _ = produced.hashes()
                if hash_bytes(file, tensor.nbytes) != sha256:
                    yield f"{tensor.name} in {shard.file} differs from what its source gives"
                elif record.hashes.get(tensor.name) != sha256:
                    yield f"{tensor.name} has another hash in {PROVENANCE_NAME}"
                advance(tensor.nbytes)


def _compare(
    source: Source, folder: Path, text: str | None, tokens: int, new_tokens: int, progress: bool
) -> dict[str, Any]:
    ids, description = token_ids(source, folder, text, tokens)
    with quiet_loading():
        model = load_source(source)
        fixed = fixed_length(source.config)
        dense = run(model, ids, new_tokens, fixed, "running the source", progress)
        del model
        gc.collect()
        model = load_target(folder)
        moe = run(model, ids, new_tokens, fixed, "running the target", progress)
        del model
    difference = (moe.logits - dense.logits).abs_()
    agree = moe.logits.argmax(-1) == dense.logits.argmax(-1)
    return {
        "text": description,
        "logits": {
            "tokens": len(moe.logits),
            "max_abs_difference": difference.max().item(),
            "mean_abs_difference": difference.mean().item(),
            "top1_agreement": agree.double().mean().item(),
            "kl": _divergence(dense.logits, moe.logits),
        },
        "loss": {"source": dense.loss, "target": moe.loss, "difference": moe.loss - dense.loss},
        "decode": {
            "greedy_tokens": len(moe.greedy),
            "greedy_equal": moe.greedy == dense.greedy,
            "cached_max_abs_difference": (moe.cached - moe.uncached).abs().max().item(),
        },
    }


def _divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of the next token's distribution from the source's, in nats."""
    total = 0.0
    for ours, theirs in zip(exact.split(_CHUNK), other.split(_CHUNK), strict=True):
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(exact)


def _judge(measured: dict[str, Any], tolerance: float, exact: bool) -> list[str]:
    logits, decode, failures = measured["logits"], measured["decode"], []
    # Rounding that tips a router's choice between experts that differ is no fault of the cache.
    limit = tolerance if exact else 100 * tolerance
    # Written so that NaN fails.
    if not decode["cached_max_abs_difference"] <= limit:
        failures.append(
            f"cached and uncached decoding differ by {decode['cached_max_abs_difference']:.3g}, tolerance {limit:.3g}"
        )
    if not exact:
        return failures
    if not logits["max_abs_difference"] <= tolerance:
        failures.append(f"max |Δlogit| is {logits['max_abs_difference']:.3g}, tolerance {tolerance:.3g}")
    if logits["top1_agreement"] != 1:
        failures.append(f"the likeliest token is the source's in {logits['top1_agreement']:.4%} of places, not in all")
    if not decode["greedy_equal"]:
        failures.append(f"the {decode['greedy_tokens']} greedy tokens are not those of the source")
    return failures


def token_ids(source: Source, folder: Path, text: str | None, tokens: int) -> tuple[torch.Tensor, str]:
    """Ids (1, S) of the text, and a description of it; random ids where the source has no tokenizer.

    Raises:
        ValueError: the text has fewer tokens than asked for.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
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
    return transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32).eval()


def load_target(folder: Path) -> Any:
    """The converted model in fp32, by this package."""
    from ..model import HfMoeForCausalLM

    return HfMoeForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


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
