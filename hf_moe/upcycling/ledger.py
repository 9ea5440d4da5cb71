"""The ledger of a compressed attention: what each layer kept, what that was expected to cost, and what it did cost.

`ledger.json` stands in the target. The plan reads the layers' sizes from it, `verify` and the card its figures.
"""

import json
from pathlib import Path
from typing import Any

from .widths import Width

LEDGER_NAME = "ledger.json"


def write_ledger(path: Path, layers: list[dict[str, Any]], model: dict[str, float], about: dict[str, Any]) -> None:
    """Write a row for each layer, and the whole model's figures beside those of the exact form, which loses nothing.

    Args:
        about: what else is known: numbers cached, tokens read, and the curve of predicted KL over numbers cached.
    """
    exact = {"kl": 0.0, "top1": 1.0, "ppl": model["ppl_source"]}
    content = {"format": 1, **about, "model": model, "exact": exact, "layers": layers}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_ledger(folder: Path) -> dict[str, Any]:
    """The ledger of a folder.

    Raises:
        ValueError: there is none, or it is not what `write_ledger` writes.
    """
    path = folder / LEDGER_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        widths_in(content)
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error!r}") from error


def widths_in(ledger: dict[str, Any]) -> list[Width]:
    """What each layer caches."""
    rows = sorted(ledger["layers"], key=lambda row: row["layer"])
    return [Width(row["latent"], None if row["frequencies"] is None else tuple(row["frequencies"])) for row in rows]
