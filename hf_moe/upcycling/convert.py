"""`upcycle`: from a dense checkpoint to a folder that appears whole or not at all."""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .calibration import calibrate
from .calibration import digest as digest_of_texts
from .card import write_card
from .demand import disk_bytes
from .gguf_source import GgufSource
from .headers import INDEX_NAME
from .journal import JOURNAL_NAME, Journal
from .layout import exact_config, make_plan
from .ledger import read_ledger, widths_in
from .ledger_plot import PLOT_NAME, draw_ledger
from .options import Options
from .plan import Plan
from .progress import byte_bar
from .sources import COPIED_FILES, FolderSource, Source, open_source
from .stream import write_weights

PROVENANCE_NAME = "provenance.json"
# Files that are not weights; a few megabytes of tokenizer at most.
_SMALL_FILES = 64 * 1024 * 1024


def upcycle(source: str | Path | list[str | Path], out: str | Path, *, progress: bool = True, **choices: Any) -> Path:
    """Convert a dense checkpoint into a latent-attention mixture of experts.

        upcycle("HuggingFaceTB/SmolLM2-135M-Instruct", "moe", mode="copy", experts=4, top_k=2)

    The weights are written into a hidden folder beside `out`, which takes its name when all is done. A run that was
    interrupted is continued by the next one with the same arguments, and ends in the same bytes.

    Args:
        source: folder of safetensors, GGUF file, or Hub id (`owner/name`, `owner/name@revision`); a list of them in
            mode `branch`.
        out: folder to make; it must not exist.
        progress: whether to draw progress bars.
        choices: fields of `Options`.
    Returns:
        `out`.
    Raises:
        ValueError: bad choices, or a source that is unknown, damaged or cannot be held; nothing is left behind.
        FileExistsError: `out` exists. ConnectionError: the Hub is out of reach.
        OSError: the disk is full; what was written stays in the hidden folder for the next run.
    Cost: memory of one layer; the target is written once.
    """
    options = Options(**choices)
    target = check_target(out)
    return convert(open_source(source), target, options, progress)


def check_target(out: str | Path) -> Path:
    """The absolute path of a folder that can be made.

    Raises:
        FileExistsError, ValueError. OSError: a system without the locks and the renaming that a conversion rests on.
    """
    if platform.system() == "Windows":
        raise OSError("folders are written on Linux and macOS only: on Windows use WSL, where all of this works")
    target = Path(out).expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{out} exists; choose another name or remove it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} does not exist, so {target.name} cannot be made in it")
    return target


def partial_folder(target: Path) -> Path:
    """The hidden sibling in which a conversion works."""
    return target.parent / f".{target.name}.partial"


def convert(source: Source, target: Path, options: Options, progress: bool) -> Path:
    """As `upcycle`, from an opened source and a checked target."""
    plan = make_plan(source, options)
    # Refuses, before anything is written, what the model could not be built from.
    config = target_config(plan.config)
    for each in source.branches:
        _check_tied_head(each)
    digest = plan.digest(source.fingerprint(), config.to_dict(), digest_of_texts(options))

    def prepare(partial: Path) -> tuple[Plan, Source]:
        learnt = calibrate(source, options, exact_config(source, options), partial, progress)
        return learnt_plan(source, options, partial), learnt

    def finish(plan: Plan, partial: Path, journal: Journal) -> None:
        write_rest(plan, source, target_config(plan.config), partial, journal)

    return build(plan, source, target, digest, finish, progress, prepare)


def target_config(fields: dict[str, Any]) -> Any:
    """The `HfMoeConfig` of these fields.

    Raises:
        ValueError: one that no model could be built from.
    """
    from huggingface_hub.errors import StrictDataclassError

    from ..model.configuration_hf_moe import HfMoeConfig

    try:
        return HfMoeConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"the target cannot hold this model: {error.__cause__ or error}") from error


def _check_tied_head(source: Source) -> None:
    """Refuse a head of its own that the configuration says is the embedding: one of the two would be lost.

    Cost: reads both, where both are stored.
    """
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if source.config.get("tie_word_embeddings") and all(name in source.headers for name in names):
        embedding, head = map(source.read, names)
        if not embedding.equal(head):
            raise ValueError(
                f"{source.title} has a {names[1]} other than {names[0]}, and tie_word_embeddings=True: say False in "
                "its config.json to keep both, or remove the first"
            )


def learnt_plan(source: Source, options: Options, folder: Path) -> Plan:
    """The plan, with the sizes that a compressed attention has in this folder."""
    widths = widths_in(read_ledger(folder)) if options.attention == "compress" else None
    return make_plan(source, options, widths)


def build(
    plan: Plan,
    source: Source,
    target: Path,
    digest: str,
    finish: Callable[[Plan, Path, Journal], None],
    progress: bool,
    prepare: Callable[[Path], tuple[Plan, Source]] | None = None,
) -> Path:
    """Write the plan's weights and what `finish` adds into the hidden folder, then let the target appear.

    `prepare` may write there first, and returns the plan and the source that follow from it.
    """
    partial = partial_folder(target)
    _check_space(target.parent, plan, source, partial)
    if partial.is_dir() and any(partial.iterdir()) and not (partial / JOURNAL_NAME).is_file():
        raise FileExistsError(
            f"{partial} is in the way, and no interrupted conversion's: finish it, remove it, or choose another name"
        )
    partial.mkdir(exist_ok=True)
    journal = Journal(partial, digest)
    try:
        if not journal.resume():
            # First what is there, then the new plan's name: killed between the two, nobody takes what another plan
            # has learnt for this one's.
            _clear(partial)
            journal.begin()
        plan, source = prepare(partial) if prepare else (plan, source)
        with byte_bar("writing weights", plan.nbytes, progress) as advance:
            advance(sum(len(shard.header) for shard in plan.shards))
            write_weights(plan, source, partial, journal, advance)
        finish(plan, partial, journal)
        _sync_folder(partial)
        # Only then the journal: killed between the two, the model is whole, with a file more than it needs. The other
        # way round, nobody could tell the folder that is left from one that was never ours.
        os.rename(partial, target)
        (target / JOURNAL_NAME).unlink()
        _sync_folder(target.parent)
    except ValueError:
        # The source or the choice is at fault: no later run could go on from here. The journal goes last, since without
        # it a folder counts as somebody else's.
        with suppress(OSError):
            _clear(partial)
            shutil.rmtree(partial)
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {target.name} needs {disk_bytes(plan, source):,} bytes; free some space and run "
                f"the same command again, it goes on from {partial.name}",
            ) from error
        raise
    finally:
        journal.close()
    return target


def _check_space(folder: Path, plan: Plan, source: Source, partial: Path) -> None:
    present = sum(path.stat().st_size for path in partial.glob("*")) if partial.is_dir() else 0
    needed, free = disk_bytes(plan, source) + _SMALL_FILES - present, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"not enough space in {folder}: {needed:,} bytes needed, {free:,} free")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != JOURNAL_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_rest(plan: Plan, source: Source, config: Any, folder: Path, journal: Journal) -> None:
    """Everything beside the weights: index, configuration, modelling files, tokenizer, card, provenance."""
    _write_json(folder / INDEX_NAME, plan.index())
    config.save_pretrained(folder)
    copy_model_files(folder)
    # The source's own takes its place. The folder is not asked: a killed run may have left half of one there.
    _write_generation_config(plan, folder)
    copy_tokenizer(source, folder)
    if plan.options.attention == "compress":
        draw_ledger(read_ledger(folder), plan.item, folder / PLOT_NAME)
    write_card(plan, source, folder)
    _write_json(folder / PROVENANCE_NAME, provenance(plan, source, folder, journal))


def copy_model_files(folder: Path) -> None:
    """The sealed modelling files, so that the folder loads where this package is not installed."""
    from .. import model

    for path in sorted(Path(str(model.__file__)).parent.glob("*_hf_moe.py")):
        shutil.copyfile(path, folder / path.name)


def copy_tokenizer(source: Source, folder: Path) -> None:
    """Tokenizer, chat template and generation settings, copied, or translated from a GGUF file."""
    source = source.branches[0]
    if isinstance(source, FolderSource):
        for pattern in COPIED_FILES:
            for path in sorted(source.path.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
    elif isinstance(source, GgufSource) and source.has_tokenizer():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(**source.load_arguments()).save_pretrained(folder)


def _write_generation_config(plan: Plan, folder: Path) -> None:
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    GenerationConfig(**{name: plan.config[name] for name in names}).save_pretrained(folder)


def provenance(plan: Plan, source: Source, folder: Path, journal: Journal) -> dict[str, Any]:
    """Which bytes of the source made each tensor, and the hash of everything in the folder."""
    tensors = []
    places = [(shard.file, tensor) for shard in plan.shards for tensor in shard.tensors]
    for (file, tensor), entry in zip(places, journal.entries, strict=True):
        sources = [
            {
                "name": part.name,
                "rows": None if part.stop is None else [part.start, part.stop],
                "source": part.branch,
                "sha256": sha256,
            }
            for part, sha256 in zip(tensor.parts, entry["inputs"], strict=True)
        ]
        tensors.append(
            {
                "name": tensor.name,
                "file": file,
                "rule": tensor.rule,
                "arguments": dict(tensor.arguments),
                "sources": sources,
                "sha256": entry["sha256"],
            }
        )
    headers = {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in plan.shards}
    small = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in headers and path.name not in (JOURNAL_NAME, "README.md", PROVENANCE_NAME)
    }
    return {
        "format": 1,
        "family": plan.family,
        "sources": [{"name": each.title, "revision": each.revision} for each in source.branches],
        "options": plan.options.to_dict(),
        "files": small,
        "shard_headers": headers,
        "tensors": tensors,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
