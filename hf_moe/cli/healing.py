"""`hf-moe heal`: a compressed model learns back what it lost."""

from pathlib import Path
from typing import Annotated

import typer

from .app import NUMBERS, OUTPUT, Quiet, app, one_sentence
from .conversion import SourceArgument

TRAINING = "Training"


@app.command()
def heal(
    source: SourceArgument,
    model: Annotated[Path, typer.Argument(help="Folder with the hf_moe model that was made of it.")],
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text file, or token ids as .npy or .npy.xz; may be repeated.", exists=True, dir_okay=False),
    ],
    heldout: Annotated[
        Path | None,
        typer.Option(
            help="Such a file to measure with; by default the text's last fiftieth.", exists=True, dir_okay=False
        ),
    ] = None,
    train: Annotated[
        str, typer.Option(help="attention: its weights only. all: every weight.", rich_help_panel=TRAINING)
    ] = "all",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.", rich_help_panel=TRAINING)] = 10_000_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.", rich_help_panel=TRAINING)] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.", rich_help_panel=TRAINING)] = 32,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="The highest of a cosine.", rich_help_panel=TRAINING)
    ] = 3e-4,
    layer_weight: Annotated[
        float, typer.Option(min=0, help="Weight of the layers' outputs beside the logits.", rich_help_panel=TRAINING)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of the rows.", rich_help_panel=NUMBERS)] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=OUTPUT)] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from an interrupted run's last checkpoint.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model towards its source's whole distribution; labels are not read.

    [bold]Example:[/bold] hf-moe heal HuggingFaceTB/SmolLM2-135M-Instruct compressed healed --text manuals.txt
    """
    with one_sentence(resumable=True, again="run the same command with --resume"):
        from ..upcycling.healed import heal as run

        record = run(
            source,
            model,
            out,
            [*text],
            heldout=heldout,
            resume=resume,
            progress=not quiet,
            train=train,
            tokens=tokens,
            length=length,
            batch=batch,
            learning_rate=learning_rate,
            layer_weight=layer_weight,
            seed=seed,
            save_steps=save_steps,
        )
        before, after = record["before"], record["after"]
        typer.echo(f"{out} is ready, {record['settings']['tokens']:,} tokens later:")
        typer.echo(f"  KL from the source {before['kl']:.4f} -> {after['kl']:.4f}")
        typer.echo(f"  same most likely token {before['top1']:.2%} -> {after['top1']:.2%}")
        typer.echo(f"  perplexity {before['ppl']:.3f} -> {after['ppl']:.3f}, the source's {after['ppl_source']:.3f}")
