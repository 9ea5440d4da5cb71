"""The command line: `hf-moe`. Each command is thin; what it needs is imported inside of it, so that help is instant."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn a dense language model into a mixture of experts with a small key-value cache, prove that nothing was "
    "lost, and share it.",
)

SOURCE = typer.Argument(help="Folder of safetensors, a .gguf file, or a Hub id such as owner/name or owner/name@rev.")
MIXTURE, NUMBERS, OUTPUT = "Mixture", "Numbers", "Output"


@contextmanager
def one_sentence(resumable: bool = False) -> Iterator[None]:
    """End with one line on standard error and a status above 0 where the user can do something about it."""
    try:
        yield
    except KeyboardInterrupt:
        again = "; run the same command again to go on from there" if resumable else ""
        typer.echo(f"\nInterrupted{again}.", err=True)
        sys.exit(130)
    except (ValueError, OSError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else error
        typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
        sys.exit(1)


def _indices(value: str) -> tuple[int, ...]:
    """Layers as "0,1,5-7"."""
    layers: list[int] = []
    for part in filter(None, value.split(",")):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ValueError(f"--dense-layers={value!r} is not a list such as 0,1,5-7")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


@app.command()
def upcycle(
    source: Annotated[str, SOURCE],
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    mode: Annotated[
        str, typer.Option(help="copy: every expert is the MLP. split: the MLP cut in shards.", rich_help_panel=MIXTURE)
    ] = "copy",
    experts: Annotated[
        int, typer.Option(help="Routed experts a layer; 1 converts the attention only.", rich_help_panel=MIXTURE)
    ] = 8,
    top_k: Annotated[int, typer.Option(help="Routed experts a token.", rich_help_panel=MIXTURE)] = 2,
    shards: Annotated[int, typer.Option(help="Parts that split cuts the MLP into.", rich_help_panel=MIXTURE)] = 1,
    shared_shards: Annotated[
        int, typer.Option(help="How many of the shards every token passes.", rich_help_panel=MIXTURE)
    ] = 0,
    dense_layers: Annotated[
        str, typer.Option(help="Layers that keep their MLP, such as 0,1,5-7.", rich_help_panel=MIXTURE)
    ] = "",
    router: Annotated[str, typer.Option(help="random or zero.", rich_help_panel=MIXTURE)] = "random",
    attention: Annotated[
        str, typer.Option(help="exact: latents that give the source's logits.", rich_help_panel=NUMBERS)
    ] = "exact",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (the source's; float32 for a GGUF), float32, bfloat16 or float16.", rich_help_panel=NUMBERS
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=NUMBERS)] = 0,
    max_shard_bytes: Annotated[
        int, typer.Option(help="Size limit of one weight file.", rich_help_panel=OUTPUT)
    ] = 1_000_000_000,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Convert a dense model into a mixture of experts with latent attention.

    Memory is that of one layer. Interrupted, the same command goes on where it stopped.

    [bold]Example:[/bold] hf-moe upcycle HuggingFaceTB/SmolLM2-135M-Instruct moe --mode copy --experts 4 --top-k 2
    """
    with one_sentence(resumable=True):
        from .upcycling.convert import upcycle as run

        path = run(
            source,
            out,
            progress=not quiet,
            mode=mode,
            experts=experts,
            top_k=top_k,
            shards=shards,
            shared_shards=shared_shards,
            dense_layers=_indices(dense_layers),
            router=router,
            attention=attention,
            dtype=dtype,
            seed=seed,
            max_shard_bytes=max_shard_bytes,
        )
        typer.echo(f"{path} is ready. Prove it with: hf-moe verify {source} {out}")


@app.command()
def verify(
    source: Annotated[str, SOURCE],
    target: Annotated[Path, typer.Argument(help="Folder that hf-moe upcycle made.")],
    text: Annotated[
        Path | None, typer.Option(help="Text file to read; by default Python's language reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens whose logits are compared.")] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Greedy tokens that are compared.")] = 64,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a logit, in float32.")] = 1e-4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Compare a converted model with its source: bytes, logits, decoding. Writes certificate.json into the folder."""
    with one_sentence():
        from .upcycling.verification import verify as run

        words = text.read_text(encoding="utf-8") if text else None
        certificate = run(
            source, target, text=words, tokens=tokens, new_tokens=new_tokens, tolerance=tolerance, progress=not quiet
        )
        logits, decode, loss = certificate["logits"], certificate["decode"], certificate["loss"]
        typer.echo(f"{target}: passed")
        typer.echo(f"  {logits['tokens']} tokens of {certificate['text']}")
        typer.echo(
            f"  max |Δlogit| {logits['max_abs_difference']:.2e}, mean {logits['mean_abs_difference']:.2e}, "
            f"top-1 agreement {logits['top1_agreement']:.2%}"
        )
        typer.echo(f"  loss {loss['source']:.4f} -> {loss['target']:.4f}")
        same = "the source's" if decode["greedy_equal"] else "not the source's"
        typer.echo(
            f"  {decode['greedy_tokens']} greedy tokens: {same}; cached decoding within "
            f"{decode['cached_max_abs_difference']:.2e} of uncached"
        )


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that hf-moe upcycle made.")],
    repo_id: Annotated[str, typer.Argument(help="Repository of the Hub, owner/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to.")] = None,
) -> None:
    """Upload a converted model to the Hub. Started again, it sends only what is missing."""
    with one_sentence(resumable=True):
        from .upcycling.publish import push as run

        typer.echo(run(folder, repo_id, private=private, revision=revision))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for model, adapter, certificate and report.")] = Path(
        "demo-output"
    ),
    model: Annotated[Path | None, typer.Option(help="Dense checkpoint to start from.")] = None,
) -> None:
    """Upcycle, verify, fine-tune and generate with a small real model. Interrupted, it goes on at the last step."""
    with one_sentence(resumable=True):
        from .demo import run_demo

        run_demo(output, model)


def main() -> None:
    """Entry point of the `hf-moe` command."""
    # Import time of Transformers is no moment for its advice about optional packages.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


if __name__ == "__main__":
    main()
