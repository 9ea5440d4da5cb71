"""Proof that a conversion lost nothing: bytes against the plan, logits and decoding against the source.

Letters: S tokens compared, V vocabulary.
"""

import gc
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from .calibration import CALIBRATION_NAME, CalibratedSource, needs_experts
from .card import add_measurements
from .convert import PROVENANCE_NAME, learnt_plan
from .headers import read_folder
from .learnt_attention import ATTENTION_NAME
from .ledger import LEDGER_NAME
from .model_runs import fixed_length, load_source, load_target, quiet_loading, run, token_ids
from .options import EXACT_MODES, Options
from .plan import Plan
from .progress import byte_bar
from .sources import Source, open_source
from .stream import ahead, hash_bytes, produce

CERTIFICATE_NAME = "certificate.json"
_CHUNK = 256


class VerificationError(ValueError):
    """The target is not what it should be; the message names the first difference, the certificate all of them."""


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
    exact = record.options.mode in EXACT_MODES and record.options.attention == "exact"
    certificate: dict[str, Any] = {"passed": False, "failures": failures, "exact": exact, "source": opened.title}
    certificate |= {"revision": opened.revision, "options": record.options.to_dict()}
    if not failures:
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
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not path.is_file() or "conversion" in content:
            raise VerificationError(
                f"{folder} holds no {PROVENANCE_NAME}, so nobody can say which bytes of a source made it: only what "
                "hf-moe upcycle wrote can be verified, not a model that was exported, imported or trained further"
            )
        choices = content["options"]
        lists = {"dense_layers": tuple(choices["dense_layers"]), "calibration": tuple(choices.get("calibration", ()))}
        options = Options(**{**choices, **lists})
        hashes = {tensor["name"]: tensor["sha256"] for tensor in content["tensors"]}
        return Record(options, dict(content["files"]), hashes, content["tensors"])
    except VerificationError:
        raise
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
            advance(len(shard.header))
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
