"""`hf-moe tune | inspect`: how fast a mixture's experts run here, and what they do."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, one_sentence


@app.command()
def tune(
    model: Annotated[
        list[str] | None, typer.Option(help="Folder or Hub id of a mixture to tune for; may be repeated.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Hidden size, expert width, experts, experts a token: 2048,768,128,8; may be repeated."),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens a step; 1024 and 8192 by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Table to write; by default the one that the kernels read.", dir_okay=False)
    ] = None,
) -> None:
    """Find the fastest tiles of the expert kernels on this machine's GPU, and save them for later processes.

    About three minutes for each shape and number of tokens.
    """
    with one_sentence():
        from ..kernels.tuning import shape_of
        from ..kernels.tuning import tune as run
        from ..upcycling.sources import model_config

        shapes = [_sizes(each) for each in shape or []] + [shape_of(model_config(each)) for each in model or []]
        if not shapes:
            raise ValueError("nothing to tune for: name a --model or a --shape")
        path = run(shapes, tokens or (1024, 8192), path=out, report=typer.echo)
        typer.echo(f"{path} is written; processes that start now use it.")


def _sizes(shape: str) -> tuple[int, int, int, int]:
    """A layer as "2048,768,128,8"."""
    words = shape.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() and int(word) for word in words):
        raise ValueError(f"--shape={shape!r} is not four whole numbers such as 2048,768,128,8")
    hidden, width, experts, top_k = map(int, words)
    if top_k > experts:
        raise ValueError(f"--shape={shape!r} has {top_k} experts a token of {experts}")
    return hidden, width, experts, top_k


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture, ours or Transformers'.")],
    text: Annotated[Path, typer.Option(help="Text file to route.", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for experts.html and load.png.", file_okay=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of the text to read.")] = 1024,
) -> None:
    """Show which experts serve which tokens of a text."""
    with one_sentence():
        from rich.console import Console

        from ..training.inspection import inspect as run
        from ..training.inspection import show, write_page
        from ..training.pictures import can_draw, draw_load

        choices = run(model, text.read_text(encoding="utf-8"), tokens)
        show(choices, Console())
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_page(choices, out / "experts.html")
            typer.echo(f"{out / 'experts.html'} shows the text.")
            if can_draw():
                draw_load(choices.load.share, out / "load.png", title="load over the mean")
                typer.echo(f"{out / 'load.png'} shows the load.")
            else:
                typer.echo("There is no load.png: matplotlib is not installed.")
