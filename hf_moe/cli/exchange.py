"""`hf-moe export | import | push`: models from and for others."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Quiet, app, one_sentence


def _matrix() -> str:
    """What each format holds, a line for each feature."""
    from ..upcycling.formats import matrix, misreadings

    (_, *formats), *rows = matrix()
    return "\n\n".join(
        ["[bold]What each format holds[/bold] (a model that uses more is refused):"]
        + [
            f"{name}: " + ", ".join(f"{f} {cell}" for f, cell in zip(formats, cells, strict=True))
            for name, *cells in rows
        ]
        + ["[bold]What an engine would misread[/bold] (refused with --engine):", *misreadings()]
    )


@app.command(epilog=_matrix())
def export(
    folder: Annotated[Path, typer.Argument(help="Folder with an hf_moe model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    to: Annotated[str, typer.Option(help="mixtral, qwen3_moe or deepseek_v3.")],
    engine: Annotated[str, typer.Option(help="Who will serve it: transformers, vllm or sglang.")] = "transformers",
    latent_norm: Annotated[
        str,
        typer.Option(
            help="For deepseek_v3 from latents without norm. constant: a constant beside them undoes it, exactly. "
            "calibrated: a norm that is near on text; not exact, but without the bias that vllm and sglang leave out."
        ),
    ] = "constant",
    measure: Annotated[
        bool, typer.Option(help="Run both models afterwards, in float32, and say how far their logits are apart.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Write a model as one of Transformers' own classes, which needs nothing of this package."""
    with one_sentence(resumable=True):
        from ..upcycling.exchange import export as run

        typer.echo(f"{run(folder, out, to, engine=engine, latent_norm=latent_norm, progress=not quiet)} is ready.")
    if measure:
        # The folder is whole: there is nothing to go on with.
        with one_sentence():
            from ..upcycling.export_measures import measure_export

            found = measure_export(folder, out, progress=not quiet)
            same = "the same" if found["greedy_equal"] else "not the same"
            typer.echo(f"  {found['tokens']} tokens of {found['text']}, float32, by Transformers:")
            typer.echo(
                f"  max |Δlogit| {found['max_abs_difference']:.2e}, mean {found['mean_abs_difference']:.2e}, "
                f"top-1 agreement {found['top1_agreement']:.2%}, {found['greedy_tokens']} greedy tokens {same}"
            )


@app.command(name="import")
def import_(
    folder: Annotated[
        str, typer.Argument(help="Folder or Hub id of a Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek-V3 model.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    quiet: Quiet = False,
) -> None:
    """Read one of Transformers' own mixtures as a latent-attention model, exactly."""
    with one_sentence(resumable=True):
        from ..upcycling.exchange import import_mixture as run

        typer.echo(f"{run(folder, out, progress=not quiet)} is ready.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder with a whole model: config.json and safetensors.")],
    repo_id: Annotated[str, typer.Argument(help="Repository of the Hub, owner/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to.")] = None,
) -> None:
    """Upload a model to the Hub, however it was made. Started again, it sends only what is missing."""
    with one_sentence(resumable=True):
        from ..upcycling.publish import push as run

        typer.echo(run(folder, repo_id, private=private, revision=revision))
