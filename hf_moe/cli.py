"""The command line: `hf-moe`. Each command is thin and imports inside of it what it needs.

Nothing heavy stands at the top: `hf_moe_command` starts this module without the package's own import, which
`one_sentence` makes up for where a command loads models.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn a dense language model into a mixture of experts with a small key-value cache, prove that nothing was "
    "lost, and share it.",
)

SOURCE_HELP = "Folder of safetensors, a .gguf file, or a Hub id such as owner/name or owner/name@revision."
MIXTURE, NUMBERS, OUTPUT = "Mixture", "Numbers", "Output"


@contextmanager
def one_sentence(resumable: bool = False, model: bool = True) -> Iterator[None]:
    """End with one line on standard error and a status above 0 where the user can do something about it.

    `model` says whether Transformers has to know ours.
    """
    try:
        if model:
            _register()
        yield
    except KeyboardInterrupt:
        again = "; run the same command again to go on from there" if resumable else ""
        typer.echo(f"\nInterrupted{again}.", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or __package__).startswith(str(__package__)):
            raise
        typer.echo(f"Error: this command needs {error.name}, which is not installed", err=True)
        sys.exit(1)
    except (ValueError, OSError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else error
        typer.echo(f"Error: {' '.join(str(message).split())}", err=True)
        sys.exit(1)


def _register() -> None:
    """Make the import of the package whole, where `hf_moe_command` entered it without."""
    package = sys.modules[__package__]
    if not hasattr(package, "HfMoeConfig"):
        package.__spec__.loader.exec_module(package)  # type: ignore[union-attr]


@contextmanager
def _torch_hidden(*sources: str) -> Iterator[None]:
    """Let Transformers import its configurations as it does without torch: they are all that a plan wants of it.

    A GGUF file's configuration it reads with torch only.
    """
    hidden = "torch" not in sys.modules and not any(source.endswith(".gguf") for source in sources)
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
        # Or it would say that models cannot be built.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


def _indices(value: str) -> tuple[int, ...]:
    """Layers as "0,1,5-7"."""
    layers: list[int] = []
    for part in filter(None, value.split(",")):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ValueError(f"--dense-layers={value!r} is not a list such as 0,1,5-7")
        if last and int(last) < int(first):
            raise ValueError(f"--dense-layers={value!r} has the empty range {part}")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def _options(choices: dict[str, Any]) -> Any:
    """The fields of `Options` among a command's arguments."""
    from dataclasses import fields

    from .upcycling.options import Options

    chosen = {field.name: choices[field.name] for field in fields(Options) if field.name in choices}
    lists = {"dense_layers": _indices(choices["dense_layers"]), "calibration": tuple(choices["calibration"] or ())}
    return Options(**{**chosen, **lists})


def _show(summary: dict[str, Any]) -> None:
    """Print a plan's summary as tables."""
    from rich.console import Console
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
        rows.add_row(*(f"{layer[name]:,}" if isinstance(layer[name], int) else layer[name] for name in names))
    console.print(rows)
    console.print(
        f"The conversion writes {run['disk_bytes']:,} bytes in {target['files']} files, holds at most "
        f"{run['memory_peak_bytes']:,} bytes in memory, and takes about {run['seconds']} s at "
        f"{run['assumed_bytes_per_second']:,} bytes a second."
    )


SourceArgument = Annotated[str, typer.Argument(help=SOURCE_HELP)]
Mode = Annotated[
    str,
    typer.Option(
        help="copy: every expert is the MLP. split: the MLP cut in shards. drop: copies with neurons drawn anew. "
        "noise: copies with noise. cluster: the MLP's neurons in groups, no more parameters. branch: experts of "
        "several models. The first two are exact.",
        rich_help_panel=MIXTURE,
    ),
]
Branch = Annotated[
    list[str] | None, typer.Option(help="A further source for mode branch; may be repeated.", rich_help_panel=MIXTURE)
]
Experts = Annotated[
    int, typer.Option(help="Routed experts a layer; 1 converts the attention only.", rich_help_panel=MIXTURE)
]
TopK = Annotated[int | None, typer.Option(help="Routed experts a token; 2 by default.", rich_help_panel=MIXTURE)]
Shards = Annotated[int, typer.Option(help="Parts that split cuts the MLP into.", rich_help_panel=MIXTURE)]
SharedShards = Annotated[int, typer.Option(help="How many of the shards every token passes.", rich_help_panel=MIXTURE)]
SplitScale = Annotated[
    str,
    typer.Option(
        help="factor: in the configuration, weights stay as they are. down: on the down-projections, for export to "
        "classes without a routed factor.",
        rich_help_panel=MIXTURE,
    ),
]
DropRatio = Annotated[float, typer.Option(help="Share of the neurons that drop draws anew.", rich_help_panel=MIXTURE)]
NoiseStd = Annotated[float, typer.Option(help="Noise in units of each matrix's deviation.", rich_help_panel=MIXTURE)]
DenseLayers = Annotated[str, typer.Option(help="Layers that keep their MLP, such as 0,1,5-7.", rich_help_panel=MIXTURE)]
Router = Annotated[
    str | None,
    typer.Option(
        help="random (by default), zero, centroids (of calibration text), activity (cluster), or prompts (branch).",
        rich_help_panel=MIXTURE,
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file for cluster, centroids and prompts, there one for each source; by default Python's reference.",
        rich_help_panel=MIXTURE,
    ),
]
CalibrationTokens = Annotated[int, typer.Option(help="Tokens of it that are read.", rich_help_panel=MIXTURE)]
Attention = Annotated[str, typer.Option(help="exact: latents that give the source's logits.", rich_help_panel=NUMBERS)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the source's; float32 for a GGUF), float32, bfloat16 or float16.", rich_help_panel=NUMBERS
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=NUMBERS)]
ShardBytes = Annotated[int, typer.Option(help="Size limit of one weight file.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)]


@app.command()
def plan(
    source: SourceArgument,
    mode: Mode = "copy",
    branch: Branch = None,
    experts: Experts = 8,
    top_k: TopK = None,
    shards: Shards = 1,
    shared_shards: SharedShards = 0,
    split_scale: SplitScale = "factor",
    drop_ratio: DropRatio = 0.5,
    noise_std: NoiseStd = 0.05,
    dense_layers: DenseLayers = "",
    router: Router = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 4096,
    attention: Attention = "exact",
    dtype: Dtype = "auto",
    max_shard_bytes: ShardBytes = 1_000_000_000,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Say what a conversion would give and take, from the headers of the weights alone. Writes nothing."""
    choices = dict(locals())
    with one_sentence(model=False), _torch_hidden(source, *(branch or [])):
        from .upcycling.layout import make_plan
        from .upcycling.sources import open_source
        from .upcycling.summary import summarise

        opened = open_source([source, *(branch or [])], headers_only=True)
        summary = summarise(make_plan(opened, _options(choices)), opened)
        if json:
            from json import dumps

            typer.echo(dumps(summary, indent=1))
        else:
            _show(summary)


@app.command()
def upcycle(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    mode: Mode = "copy",
    branch: Branch = None,
    experts: Experts = 8,
    top_k: TopK = None,
    shards: Shards = 1,
    shared_shards: SharedShards = 0,
    split_scale: SplitScale = "factor",
    drop_ratio: DropRatio = 0.5,
    noise_std: NoiseStd = 0.05,
    dense_layers: DenseLayers = "",
    router: Router = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = 4096,
    attention: Attention = "exact",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    max_shard_bytes: ShardBytes = 1_000_000_000,
    quiet: Quiet = False,
) -> None:
    """Convert a dense model into a mixture of experts with latent attention.

    Memory is that of one layer. Interrupted, the same command goes on where it stopped.

    [bold]Example:[/bold] hf-moe upcycle HuggingFaceTB/SmolLM2-135M-Instruct moe --mode copy --experts 4 --top-k 2
    """
    choices = dict(locals())
    with one_sentence(resumable=True):
        from .upcycling.convert import check_target, convert
        from .upcycling.sources import open_source

        options, target = _options(choices), check_target(out)
        path = convert(open_source([source, *(branch or [])]), target, options, progress=not quiet)
        words = ["hf-moe", "verify", source, str(out), *chain(*(("--branch", each) for each in branch or []))]
        typer.echo(f"{path} is ready. Prove it with: {shlex.join(words)}")


@app.command()
def verify(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="Folder that hf-moe upcycle made.")],
    branch: Annotated[list[str] | None, typer.Option(help="The further sources of mode branch.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file to read; by default Python's language reference.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens whose logits are compared.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens that are compared.")] = 64,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a logit, in float32.")] = 1e-4,
    quiet: Quiet = False,
) -> None:
    """Compare a converted model with its source: bytes, logits, decoding. Writes certificate.json into the folder."""
    with one_sentence():
        from .upcycling.verification import verify as run

        words = text.read_text(encoding="utf-8") if text else None
        certificate = run(
            [source, *(branch or [])],
            target,
            text=words,
            tokens=tokens,
            new_tokens=new_tokens,
            tolerance=tolerance,
            progress=not quiet,
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


def _matrix() -> str:
    """What each format holds, a line for each feature."""
    from .upcycling.formats import matrix

    (_, *formats), *rows = matrix()
    return "\n\n".join(
        ["[bold]What each format holds[/bold] (a model that uses more is refused):"]
        + [
            f"{name}: " + ", ".join(f"{f} {cell}" for f, cell in zip(formats, cells, strict=True))
            for name, *cells in rows
        ]
    )


@app.command(epilog=_matrix())
def export(
    folder: Annotated[Path, typer.Argument(help="Folder with an hf_moe model.")],
    out: Annotated[Path, typer.Argument(help="Folder to make. It appears when it is complete.")],
    to: Annotated[str, typer.Option(help="mixtral, qwen3_moe or deepseek_v3.")],
    engine: Annotated[str, typer.Option(help="Who will serve it: transformers, vllm or sglang.")] = "transformers",
    quiet: Quiet = False,
) -> None:
    """Write a model as one of Transformers' own classes, which needs nothing of this package."""
    with one_sentence(resumable=True):
        from .upcycling.exchange import export as run

        typer.echo(f"{run(folder, out, to, engine=engine, progress=not quiet)} is ready.")


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
        from .upcycling.exchange import import_mixture as run

        typer.echo(f"{run(folder, out, progress=not quiet)} is ready.")


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
        from .kernels.tuning import shape_of
        from .kernels.tuning import tune as run
        from .upcycling.sources import model_config

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

        from .training.inspection import inspect as run
        from .training.inspection import show, write_page
        from .training.pictures import draw_load

        choices = run(model, text.read_text(encoding="utf-8"), tokens)
        show(choices, Console())
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_page(choices, out / "experts.html")
            draw_load(choices.load.share, out / "load.png", title="load over the mean")
            typer.echo(f"{out / 'experts.html'} shows the text, {out / 'load.png'} the load.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder with a whole model: config.json and safetensors.")],
    repo_id: Annotated[str, typer.Argument(help="Repository of the Hub, owner/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to.")] = None,
) -> None:
    """Upload a model to the Hub, however it was made. Started again, it sends only what is missing."""
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
