"""Heal a folder: source, compressed model and text in, a folder with the trained model and what was measured out."""

import hashlib
import json
import lzma
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from .card import add_healing
from .convert import PROVENANCE_NAME, check_target, copy_model_files, partial_folder
from .headers import INDEX_NAME
from .lock import locked
from .progress import step_bar
from .sources import holds_tokenizer, open_source, read_config

HEALING_NAME = "healing.json"
_SETTINGS = "settings.json"


def heal(
    source: str | Path,
    folder: str | Path,
    out: str | Path,
    text: list[str | Path],
    *,
    heldout: str | Path | None = None,
    heldout_rows: int = 128,
    heldout_length: int | None = None,
    resume: bool = False,
    progress: bool = True,
    **choices: Any,
) -> dict[str, Any]:
    """Train a model of ours towards the source that it was made of, and write it as a folder of its own.

        heal("HuggingFaceTB/SmolLM2-135M-Instruct", "compressed", "healed", ["manuals.txt"], tokens=10_000_000)

    Args:
        source: the dense model, as for `upcycle`. folder: the model to heal. out: folder to make.
        text: files of plain text, or of token ids (.npy, .npy.xz); read one after the other.
        heldout: such a file for the measurement; by default the text's last fiftieth, which is then not trained on.
        heldout_rows, heldout_length: how much of its beginning, in rows of how many tokens; by default the length of
            those to train on.
        resume: go on from an interrupted run's last checkpoint.
        choices: fields of `hf_moe.training.healing.Healing`.
    Returns:
        What `healing.json` in the folder holds: settings with a hash of the text, `before` and `after` (KL, top-1
        agreement, perplexity of the model and of the source on the held-out text), and the curve of the loss.
    Raises:
        ValueError: bad choices, a text that is too short, a source of another vocabulary, depth or width; or an
            interrupted run is in the way, was one with other settings, or still runs.
    Cost: both models in fp32 in memory, and Trainer's state.
    """
    import torch

    from ..training import healing
    from ..training.divergence import measure_agreement
    from .model_runs import load_source, load_target, quiet_loading

    options, target, opened = healing.Healing(**choices), check_target(out), open_source(source)
    folder = Path(folder).expanduser()
    kind = read_config(folder)
    if kind.get("model_type") != "hf_moe":
        raise ValueError(f"{folder} holds a {kind.get('model_type')!r} model; only hf_moe models are healed")
    rows, measured = _rows(text, heldout, folder, options.length, heldout_length or options.length, heldout_rows)
    partial = partial_folder(target)
    _refuse_leftovers(partial, resume)
    settings: dict[str, Any] = {"source": opened.title, "model": str(folder.absolute()), "text": [str(t) for t in text]}
    settings |= {"heldout": str(heldout) if heldout else None, **options.to_dict()}
    # Another content under the same names is another run.
    digest = hashlib.sha256(rows.numpy().tobytes() + measured.numpy().tobytes()).hexdigest()
    settings |= {"text_tokens": rows.numel(), "text_sha256": digest}
    with quiet_loading():
        model, teacher = load_target(folder), load_source(opened)
    _check_alike(model, teacher)
    words = model.get_output_embeddings().weight.shape[0]
    if (largest := max(int(rows.max()), int(measured.max()))) >= words:
        raise ValueError(f"the text has token {largest}, the model's vocabulary {words}")
    partial.mkdir(exist_ok=True)
    with locked(partial):
        _begin(partial, settings, resume)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, teacher = model.to(device), teacher.to(device)
        before = measure_agreement(model, teacher, measured).to_dict()
        with step_bar("healing", options.steps, progress) as advance:
            done = 0

            def report(step: int, steps: int, loss: float) -> None:
                nonlocal done
                advance(step - done)
                done = step

            with quiet_loading():
                curve = healing.heal(
                    model, teacher, rows, options, partial / "checkpoints", resume=resume, report=report
                )
        dtype = getattr(torch, str(kind.get("dtype") or "float32").removeprefix("torch."))
        # What is measured is what is written.
        model.to(dtype).float()
        after = measure_agreement(model.eval(), teacher, measured).to_dict()
        settings["tokens"] = options.steps * options.batch * options.length
        # The record is pushed with the model: names, and not where they lie here.
        settings |= {"model": folder.resolve().name, "text": [Path(t).name for t in text]}
        settings["heldout"] = Path(heldout).name if heldout else None
        record = {"settings": settings, "before": before, "after": after, "curve": curve}
        command = command_line(opened.title, target.name, settings)
        # Of a run that was killed: half of a file would be taken for a whole one.
        shutil.rmtree(partial / "model", ignore_errors=True)
        with quiet_loading():
            _write(model.to(dtype), folder, partial / "model", target.name, record, command)
        os.rename(partial / "model", target)
        shutil.rmtree(partial)
    return record


def _check_alike(model: Any, source: Any) -> None:
    """Refuse, before minutes of training, a model that was not made of this source.

    Raises:
        ValueError: with both numbers.
    """
    for name, numbers in (
        ("vocabulary", [each.get_output_embeddings().weight.shape[0] for each in (model, source)]),
        ("depth in layers", [each.config.num_hidden_layers for each in (model, source)]),
        ("width", [each.config.hidden_size for each in (model, source)]),
    ):
        if numbers[0] != numbers[1]:
            raise ValueError(
                f"the model's {name} of {numbers[0]} is not the source's of {numbers[1]}: name the source that it was "
                "made of"
            )


def command_line(source: str, out: str, settings: dict[str, Any]) -> str:
    """The command that heals so again."""
    words = ["hf-moe", "heal", source, settings["model"], out]
    for name in settings["text"]:
        words += ["--text", name]
    if settings["heldout"]:
        words += ["--heldout", settings["heldout"]]
    for name in ("train", "tokens", "length", "batch", "learning_rate", "layer_weight", "seed"):
        words += [f"--{name.replace('_', '-')}", settings[name]]
    return shlex.join(map(str, words))


def _refuse_leftovers(partial: Path, resume: bool) -> None:
    """Before models are loaded: what is there has to be a run that goes on."""
    if not partial.exists() or not any(partial.iterdir()):
        return
    if not (partial / _SETTINGS).is_file():
        raise ValueError(f"{partial} is in the way, and no interrupted run's: remove it, or choose another name")
    if not resume:
        raise ValueError(f"{partial} is in the way: resume the interrupted run, or remove it to begin anew")


def _begin(partial: Path, settings: dict[str, Any], resume: bool) -> None:
    path = partial / _SETTINGS
    if resume and path.is_file():
        if (found := json.loads(path.read_text(encoding="utf-8"))) != settings:
            changed = [name for name in settings if settings[name] != found.get(name)]
            raise ValueError(
                f"the interrupted run in {partial} had another {', '.join(changed)}; remove it to begin anew"
            )
        return
    # Whole or not at all: a folder without it is nobody's.
    written = partial.with_name(f"{partial.name}.{_SETTINGS}")
    written.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)


def _rows(
    text: list[Any], heldout: Any, folder: Path, length: int, heldout_length: int, heldout_rows: int
) -> tuple[Any, Any]:
    """Rows of ids to train on and to measure with."""
    import torch

    ids = torch.cat([token_ids(path, folder) for path in text])
    if heldout is None:
        count = max(heldout_length, min(heldout_rows * heldout_length, len(ids) // 50))
        ids, held = ids[:-count], ids[-count:]
    else:
        held = token_ids(heldout, folder)
    rows, measured = (
        each[: len(each) // size * size].view(-1, size) for each, size in ((ids, length), (held, heldout_length))
    )
    if not len(rows) or not len(measured):
        raise ValueError(f"the text has {len(rows)} rows of {length} tokens to train on and {len(measured)} held out")
    return rows, measured[:heldout_rows]


def token_ids(path: str | Path, folder: Path) -> Any:
    """Ids of a file of text, by the folder's tokenizer, or of one that holds ids already.

    Raises:
        ValueError: an array that is no vector of whole numbers. FileNotFoundError.
    """
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    path = Path(path).expanduser()
    if path.name.endswith((".npy", ".npy.xz")):
        try:
            with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
                ids = np.load(file)
        except (ValueError, EOFError, lzma.LZMAError) as error:
            raise ValueError(f"{path} holds no array that numpy.save wrote: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{path} holds an array of {ids.dtype} and {ids.ndim} dimensions, not a row of token ids")
        if len(ids) and ids.min() < 0:
            raise ValueError(f"{path} holds the token {ids.min()}, and ids begin at 0")
        return torch.from_numpy(ids.astype(np.int64))
    if not holds_tokenizer(folder):
        raise ValueError(f"{folder} has no tokenizer, so {path} cannot be read: give token ids as .npy")
    words = path.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return torch.tensor(tokenizer(words, truncation=False, verbose=False)["input_ids"])


def _write(model: Any, folder: Path, out: Path, name: str, record: dict[str, Any], command: str) -> None:
    model.save_pretrained(out)
    copy_model_files(out)
    for path in sorted(folder.iterdir()):
        # Tokenizer, card and the ledger of the compression; not what speaks of the old bytes.
        old = path.suffix == ".safetensors" or path.name in (PROVENANCE_NAME, "certificate.json", INDEX_NAME)
        if path.is_file() and not old and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    (out / HEALING_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    add_healing(out, folder.resolve().name, name, record, command)
