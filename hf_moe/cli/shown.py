"""What `plan` and `upcycle` print."""

from pathlib import Path
from typing import Any

import typer


def show_plan(summary: dict[str, Any]) -> None:
    """Print a plan's summary as tables."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console, source, target, run = Console(), summary["source"], summary["target"], summary["conversion"]
    table = Table("", "source", "target", title=f"{source['name']} ({source['family']})")
    table.add_row("parameters", f"{source['parameters']:,}", f"{target['parameters']:,}")
    table.add_row("active for a token", f"{source['parameters']:,}", f"{target['active_parameters']:,}")
    table.add_row("bytes", f"{source['bytes']:,}", f"{target['bytes']:,}")
    table.add_row("cache bytes a token", f"{source['cache_bytes_per_token']:,}", f"{target['cache_bytes_per_token']:,}")
    console.print(table)
    rows = Table("layer", "attention", "MLP", "parameters", "active", "bytes", "cache bytes a token")
    names = ("layer", "attention", "mlp", "parameters", "active_parameters", "bytes", "cache_bytes_per_token")
    for layer in summary["layers"]:
        cells = (layer[name] for name in names)
        rows.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell.removesuffix("_attention") for cell in cells))
    console.print(rows)
    if source["left_out"]:
        console.print(f"Only the language model is converted: left out are {', '.join(source['left_out'])}.")
    text, files = run["calibration"], "1 file" if target["files"] == 1 else f"{target['files']} files"
    console.print(
        f"The conversion writes {decimal(target['bytes'])} in {files}, needs {decimal(run['disk_bytes'])} of disk, and "
        f"holds at most {decimal(run['memory_peak_bytes'])} in memory. It takes about {_time(run['seconds'])} at "
        f"{decimal(run['assumed_bytes_per_second'])} a second"
        + (f" and {text['assumed_flops_per_second'] / 1e9:.0f} GFLOP/s." if text else ".")
    )
    if text:
        console.print(
            f"Of that, reading {text['tokens']:,} tokens of calibration text takes {decimal(text['memory_bytes'])} of "
            f"memory, {decimal(text['disk_bytes'])} of disk, and {_time(text['seconds'])}; less on a GPU."
        )


def show_price(folder: Path) -> None:
    """Print what a compressed attention cost."""
    from ..upcycling.ledger import read_ledger

    ledger = read_ledger(folder)
    model, share = ledger["model"], ledger["cache_numbers"] / ledger["cache_numbers_source"]
    typer.echo(
        f"{share:.1%} of the source's cache costs, on {ledger['tokens_measured']:,} tokens, KL {model['kl']:.4f} nats; "
        f"same most likely token {model['top1']:.2%}, perplexity {model['ppl_source']:.3f} -> {model['ppl']:.3f}. "
        "More in ledger.json."
    )


def _time(seconds: float) -> str:
    """Seconds for people, in the largest unit of which there are two."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
