"""`hf-moe plan | upcycle | verify | demo`: a dense model becomes a mixture, and the proof of it."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import ATTENTION, MIXTURE, NUMBERS, OUTPUT, Quiet, app, one_sentence
from .shown import show_plan, show_price

SOURCE_HELP = "Folder of safetensors, a .gguf file, or a Hub id such as owner/name or owner/name@revision."


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

    from ..upcycling.options import Options

    chosen = {field.name: choices[field.name] for field in fields(Options) if field.name in choices}
    lists = {"dense_layers": _indices(choices["dense_layers"]), "calibration": tuple(choices["calibration"] or ())}
    return Options(**{**chosen, **lists})


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
    str | None,
    typer.Option(
        help="groups (by default in split): the router takes as many copies of every shard, whatever it learns. factor "
        "(in the configuration) and down (on the down-projections): a plain router, for export to other classes.",
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
RouterStd = Annotated[float, typer.Option(help="Deviation of a random router's weights.", rich_help_panel=MIXTURE)]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Text file for compress, cluster, centroids and prompts, there one for each source; by default Python's "
        "reference.",
        rich_help_panel=MIXTURE,
    ),
]
CalibrationTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of it that are read; 16384 by default for compressed attention, 4096 else.",
        rich_help_panel=MIXTURE,
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        help="exact: latents that give the source's logits. compress: a smaller cache, at a measured price; needs one "
        "of --cache-ratio, --kv-rank with --rope-dim, --max-kl.",
        rich_help_panel=ATTENTION,
    ),
]
CacheRatio = Annotated[
    float | None, typer.Option(help="Share of the source's cache, such as 0.5.", rich_help_panel=ATTENTION)
]
KvRank = Annotated[int | None, typer.Option(help="Latent numbers of every layer.", rich_help_panel=ATTENTION)]
RopeDim = Annotated[
    int | None,
    typer.Option(
        help="Rotary numbers of every layer's key; of one head's where keys have norms.", rich_help_panel=ATTENTION
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(help="Smallest cache within this KL on calibration text, nats.", rich_help_panel=ATTENTION),
]
QueryRank = Annotated[
    int | None,
    typer.Option(
        help="Width of a bottleneck for the queries of compress, at a price in the ledger. It saves weights and "
        "work below D·Q / (D + Q) only, D the hidden size, Q the numbers of all query heads; plan shows both.",
        rich_help_panel=ATTENTION,
    ),
]
Uniform = Annotated[bool, typer.Option("--uniform", help="The same sizes in every layer.", rich_help_panel=ATTENTION)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the source's; float32 for a GGUF), float32, bfloat16 or float16.", rich_help_panel=NUMBERS
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=NUMBERS)]
ShardBytes = Annotated[int, typer.Option(help="Size limit of one weight file.", rich_help_panel=OUTPUT)]


@app.command()
def plan(
    source: SourceArgument,
    mode: Mode = "copy",
    branch: Branch = None,
    experts: Experts = 8,
    top_k: TopK = None,
    shards: Shards = 1,
    shared_shards: SharedShards = 0,
    split_scale: SplitScale = None,
    drop_ratio: DropRatio = 0.5,
    noise_std: NoiseStd = 0.05,
    dense_layers: DenseLayers = "",
    router: Router = None,
    router_std: RouterStd = 0.02,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    attention: Attention = "exact",
    cache_ratio: CacheRatio = None,
    kv_rank: KvRank = None,
    rope_dim: RopeDim = None,
    max_kl: MaxKl = None,
    query_rank: QueryRank = None,
    uniform: Uniform = False,
    dtype: Dtype = "auto",
    max_shard_bytes: ShardBytes = 1_000_000_000,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Say what a conversion would give and take, from the headers of the weights alone. Writes nothing."""
    choices = dict(locals())
    with one_sentence(model=False), _torch_hidden(source, *(branch or [])):
        from ..upcycling.layout import make_plan
        from ..upcycling.sources import open_source
        from ..upcycling.summary import summarise

        opened = open_source([source, *(branch or [])], headers_only=True)
        summary = summarise(make_plan(opened, _options(choices)), opened)
        if json:
            from json import dumps

            typer.echo(dumps(summary, indent=1))
        else:
            show_plan(summary)
            if max_kl is not None:
                typer.echo("How much smaller the cache may be is found on the text; shown is the whole.")


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
    split_scale: SplitScale = None,
    drop_ratio: DropRatio = 0.5,
    noise_std: NoiseStd = 0.05,
    dense_layers: DenseLayers = "",
    router: Router = None,
    router_std: RouterStd = 0.02,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    attention: Attention = "exact",
    cache_ratio: CacheRatio = None,
    kv_rank: KvRank = None,
    rope_dim: RopeDim = None,
    max_kl: MaxKl = None,
    query_rank: QueryRank = None,
    uniform: Uniform = False,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    max_shard_bytes: ShardBytes = 1_000_000_000,
    quiet: Quiet = False,
) -> None:
    """Convert a dense model into a mixture of experts with latent attention.

    Memory is that of one layer, and of the calibration text's states where text is read. Interrupted, the same command
    goes on where it stopped.

    [bold]Example:[/bold] hf-moe upcycle HuggingFaceTB/SmolLM2-135M-Instruct moe --mode copy --experts 4 --top-k 2
    """
    choices = dict(locals())
    with one_sentence(resumable=True):
        from ..upcycling.convert import check_target, convert
        from ..upcycling.sources import open_source

        options, target = _options(choices), check_target(out)
        path = convert(open_source([source, *(branch or [])]), target, options, progress=not quiet)
        if options.attention == "compress":
            show_price(path)
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
        from ..upcycling.verification import verify as run

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
        typer.echo(f"{target}: passed" + ("" if certificate["exact"] else "; not exact, and this is what it costs:"))
        typer.echo(f"  {logits['tokens']} tokens of {certificate['text']}")
        typer.echo(
            f"  max |Δlogit| {logits['max_abs_difference']:.2e}, mean {logits['mean_abs_difference']:.2e}, "
            f"KL {logits['kl']:.3g}, top-1 agreement {logits['top1_agreement']:.2%}"
        )
        typer.echo(f"  loss {loss['source']:.4f} -> {loss['target']:.4f}")
        same = "the source's" if decode["greedy_equal"] else "not the source's"
        typer.echo(
            f"  {decode['greedy_tokens']} greedy tokens: {same}; cached decoding within "
            f"{decode['cached_max_abs_difference']:.2e} of uncached"
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for model, adapter, certificate and report.")] = Path(
        "demo-output"
    ),
    model: Annotated[Path | None, typer.Option(help="Dense checkpoint to start from.")] = None,
) -> None:
    """Upcycle, verify, fine-tune and generate with a small real model. Interrupted, it goes on at the last step."""
    with one_sentence(resumable=True):
        from ..demo import run_demo

        run_demo(output, model)
