"""The model card: where the model came from, what was done to it, and under which licence."""

import shlex
from pathlib import Path
from typing import Any

from ..cost import cache_widths
from .ledger import read_ledger
from .ledger_plot import PLOT_NAME
from .options import ATTENTIONS, MODES, Options
from .plan import Plan
from .sources import Source

_CARD = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}- latent-attention
- hf_moe
{base_model}---

# {title}

{kind}, made from {sources} by `hf_moe`.{left_out}

| | |
|---|---|
| parameters | {parameters:,} |
{table}| cache | {cache} |
| attention | `{attention}`: {attention_explanation} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

Made with

```
{command}
```

{proof}

{measured}
## Licence

{license_note}
"""
_PROOF = """`provenance.json` names, for every tensor, the source tensors it was made of and the SHA-256 of both.
`certificate.json`, where present, holds the measured differences from the source (`hf-moe verify`)."""
_EXCHANGE_PROOF = """`provenance.json` names, for every tensor, the rule and the source
tensors it was made of and the SHA-256 of both."""
_HEALED_PROOF = """`healing.json` holds what was measured and the settings. The weights have been trained: no byte of
theirs can be traced to the source's any more."""
_PRICE, _THIS = "## Price of the smaller cache", "| | exact attention | this model |"
# What `verify` measured stands between these; it is replaced each time.
_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"
_LICENCE = "## Licence"


def write_card(plan: Plan, source: Source, folder: Path) -> None:
    """Write README.md: the same text for the same conversion, so without a date."""
    license_name = source.license()
    # The Hub links base models by id and refuses a revision there; the card's text names it.
    known = [each.location.partition("@")[0] for each in source.branches if each.revision]
    config, sparse = plan.config, "sparse" in plan.config["mlp_layer_types"]
    name = folder.name.removeprefix(".").removesuffix(".partial")
    text = _CARD.format(
        license=license_name or "other",
        base_model="base_model:\n" + "".join(f"- {each}\n" for each in known) if known else "",
        title=name,
        folder=name,
        sources=" and ".join(map(_described, source.branches)),
        left_out=_left_out(source),
        parameters=plan.parameters,
        tags="- mixture-of-experts\n" if sparse else "",
        kind="A mixture of experts with latent attention" if sparse else "A dense model with latent attention",
        table=_mixture(plan) if sparse else f"| layers | {config['num_hidden_layers']} |\n",
        cache=_cache(config),
        attention=plan.options.attention,
        attention_explanation=ATTENTIONS[plan.options.attention],
        proof=_PROOF,
        command=command_line(plan, source, name),
        measured=f"{_price(plan, folder)}{_BEGIN}\n{_END}\n",
        license_note=license_note(source),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _mixture(plan: Plan) -> str:
    """Rows of the card's table."""
    config, mode = plan.config, plan.options.mode
    shared = f", and {config['n_shared_experts']} for all" if config["n_shared_experts"] else ""
    sparse = config["mlp_layer_types"].count("sparse")
    return (
        f"| layers | {config['num_hidden_layers']}, of which {sparse} with experts |\n"
        f"| experts | {config['n_routed_experts']}, of which {config['num_experts_per_tok']} for each token{shared} |\n"
        f"| mode | `{mode}`: {MODES[mode]} |\n"
    )


def _left_out(source: Source) -> str:
    modules = sorted({module for each in source.branches for module in each.left_out})
    return (
        f" The language model only: left out are {', '.join(f'`{module}`' for module in modules)}." if modules else ""
    )


_EXCHANGE = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
{base_model}---

# {title}

{source}, written as a `{kind}` model by `hf_moe`. {proof}

## Licence

{license_note}
"""


def write_exchange_card(source: Source, kind: str, folder: Path) -> None:
    """Write README.md of an exported or imported model."""
    text = _EXCHANGE.format(
        license=source.license() or "other",
        base_model=f"base_model:\n- {source.location.partition('@')[0]}\n" if source.revision else "",
        title=folder.name.removeprefix(".").removesuffix(".partial"),
        source=_described(source),
        kind=kind,
        proof=_EXCHANGE_PROOF,
        license_note=license_note(source),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _described(source: Source) -> str:
    return f"`{source.title}`" + (f" at revision `{source.revision}`" if source.revision else "")


def _cache(config: dict[str, Any]) -> str:
    """Numbers a token and layer, and their range where layers differ."""
    widths = cache_widths(config)
    if len(set(widths)) == 1:
        return f"{widths[0]:,} numbers a token and layer"
    return f"{sum(widths) / len(widths):,.1f} numbers a token and layer, {min(widths)} to {max(widths)}"


def _price(plan: Plan, folder: Path) -> str:
    """What a compressed attention cost, from the ledger."""
    if plan.options.attention == "exact":
        return ""
    ledger = read_ledger(folder)
    model, exact = ledger["model"], ledger["exact"]
    share = ledger["cache_numbers"] / ledger["cache_numbers_source"]
    rows = [
        ("cache", f"{1:.1%}", f"{share:.1%}"),
        ("KL from the source, nats a token", f"{exact['kl']:.4f}", f"{model['kl']:.4f}"),
        ("same most likely token", f"{exact['top1']:.2%}", f"{model['top1']:.2%}"),
        ("perplexity", f"{exact['ppl']:.3f}", f"{model['ppl']:.3f}"),
    ]
    plot = f"![KL over cache bytes, and the layers' sizes]({PLOT_NAME})\n\n" if (folder / PLOT_NAME).is_file() else ""
    return (
        f"{_PRICE}\n\n"
        f"On {ledger['tokens_measured']:,} tokens that nothing was learnt from; layers in `ledger.json`.\n\n"
        f"{_THIS}\n|---|---|---|\n" + "".join(f"| {name} | {a} | {b} |\n" for name, a, b in rows) + f"\n{plot}"
    )


def license_note(source: Source) -> str:
    """What the sources' licences mean for the result; a conflict or a gap is pointed out."""
    stated = {each.title: each.license() for each in source.branches}
    listed = ", ".join(f"{title} states `{name}`" if name else f"{title} states none" for title, name in stated.items())
    names = set(stated.values())
    if len(names) > 1:
        return f"**The sources disagree**: {listed}. Find out which terms hold for a mixture of them before sharing it."
    if None in names:
        return "The source states no licence: find out whose work it is before sharing this model."
    return f"{listed}, which holds for this model too."


def add_measurements(folder: Path, certificate: dict[str, Any]) -> None:
    """Put the certificate's numbers into the card, in place of those of an earlier run."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _BEGIN not in text or _END not in text:
        return
    rows = [("result", "passed" if certificate["passed"] else f"failed: {certificate['failures'][0]}")]
    # Where bytes are off nothing is run.
    rows += _measurements(certificate) if "logits" in certificate else []
    table = "\n".join(
        ["## Measured against the source", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    )
    before, rest = text.split(_BEGIN, 1)
    path.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{rest.split(_END, 1)[1]}", encoding="utf-8")


def _measurements(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    logits, loss, decode = certificate["logits"], certificate["loss"], certificate["decode"]
    return [
        ("text", f"{logits['tokens']} tokens of {certificate['text']}"),
        ("largest difference of a logit, fp32", f"{logits['max_abs_difference']:.2e}"),
        ("same most likely token", f"{logits['top1_agreement']:.2%}"),
        ("loss of the source", f"{loss['source']:.4f}"),
        ("loss of this model", f"{loss['target']:.4f} ({loss['difference']:+.4f})"),
        (f"{decode['greedy_tokens']} greedy tokens", "the same" if decode["greedy_equal"] else "not the same"),
    ]


def add_healing(folder: Path, former: str, name: str, record: dict[str, Any], command: str) -> None:
    """Turn the card of a model named `former` into that of the healed one.

    What healing has measured goes before the licence; what was true of the older weights only is said to be so.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _LICENCE not in text:
        return
    if _BEGIN in text and _END in text:
        before, rest = text.split(_BEGIN, 1)
        text = f"{before}{_BEGIN}\n{_END}{rest.split(_END, 1)[1]}"
    for proof in (_PROOF, _EXCHANGE_PROOF):
        text = text.replace(proof, _HEALED_PROOF)
    text = text.replace(f"\n# {former}\n", f"\n# {name}\n")
    text = text.replace(f'from_pretrained("{former}"', f'from_pretrained("{name}"')
    text = text.replace(f"{_PRICE}\n", f"{_PRICE}, before healing\n")
    text = text.replace(_THIS, _THIS.replace("this model", "before healing"))
    settings, before, after = record["settings"], record["before"], record["after"]
    rows = [
        ("KL from the source, nats a token", f"{before['kl']:.4f}", f"{after['kl']:.4f}"),
        ("same most likely token", f"{before['top1']:.2%}", f"{after['top1']:.2%}"),
        (f"perplexity (the source's is {after['ppl_source']:.3f})", f"{before['ppl']:.3f}", f"{after['ppl']:.3f}"),
    ]
    table = "\n".join(
        [
            "## Healed",
            "",
            f"Trained on {settings['tokens']:,} tokens, of a text that has {settings['text_tokens']:,}, towards the "
            f"source's distribution ({settings['train']} weights); measured on {after['tokens']:,} tokens held out.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *(f"| {name} | {a} | {b} |" for name, a, b in rows),
            "",
            "```",
            command,
            "```",
        ]
    )
    above, licence, below = text.partition(_LICENCE)
    # Of an earlier healing nothing is left.
    path.write_text(f"{above.partition('## Healed')[0]}{table}\n\n{licence}{below}", encoding="utf-8")


def command_line(plan: Plan, source: Source, name: str) -> str:
    """The command that makes this model again."""
    options = plan.options
    first, *others = source.branches
    words: list[Any] = ["hf-moe", "upcycle", first.title, name, "--mode", options.mode]
    for other in others:
        words += ["--branch", other.title]
    words += ["--experts", options.experts, "--top-k", options.top_k]
    if options.shared_shards:
        words += ["--shared-shards", options.shared_shards]
    if options.mode == "split":
        words += ["--shards", options.shards]
        words += ["--split-scale", options.split_scale]
    if options.mode == "drop":
        words += ["--drop-ratio", options.drop_ratio]
    if options.mode == "noise":
        words += ["--noise-std", options.noise_std]
    for text in options.calibration:
        words += ["--calibration", Path(text).name]
    if options.reads_text:
        words += ["--calibration-tokens", options.calibration_tokens]
    if options.dense_layers:
        words += ["--dense-layers", ",".join(map(str, options.dense_layers))]
    words += ["--attention", options.attention]
    for name in ("cache_ratio", "kv_rank", "rope_dim", "max_kl", "query_rank"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", value]
    words += ["--uniform"] if options.uniform else []
    words += ["--router", options.router, "--dtype", options.dtype]
    for name in ("router_std", "max_shard_bytes"):
        if (value := getattr(options, name)) != Options.__dataclass_fields__[name].default:
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join(map(str, [*words, "--seed", options.seed]))
