"""What a conversion learns from text: the dense model is run over it, with one layer in memory.

The result stands beside the weights: in `calibration.safetensors` for each sparse layer the order of its neurons and
the weights of its router, and a compressed attention in the files of `learnt_attention`. The plan reads them as one
more source (branch `CALIBRATION`), so that a conversion can be continued and verified without running the model again.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .clustering import activity_router, centroid_router, group_neurons, mean_router
from .compression import Text
from .demand import ATTENTION_CONTEXT, EXPERTS_CONTEXT, rows_of
from .families import CALIBRATION
from .headers import read_header
from .layerwise import DenseLayers, Passage
from .learnt_attention import ATTENTION_NAME, learn_attention
from .options import CALIBRATED, Options
from .progress import step_bar
from .sources import FolderSource, Source

CALIBRATION_NAME = "calibration.safetensors"
CALIBRATION_NAMES = (CALIBRATION_NAME, ATTENTION_NAME)

# Called with a layer's number, the inputs of its MLP (T, D) and the neurons' contributions (T, F).
Observe = Callable[[int, torch.Tensor, torch.Tensor], None]


class CalibratedSource(FolderSource):
    """A source and what was learnt about it: reads of the last branch come from the calibration's files in a folder."""

    def __init__(self, source: Source, folder: Path):
        super(FolderSource, self).__init__(source.location, source.path, source.revision)
        self.source, self.config, self.headers = source, source.config, source.headers
        self._stored, self._encodings = {}, {}
        for name in CALIBRATION_NAMES:
            if (folder / name).is_file():
                self._stored |= read_header(folder / name)

    @property
    def branches(self) -> list[Source]:
        """Those of the source, and this one at `CALIBRATION`."""
        branches: list[Source] = [*self.source.branches, self]
        assert branches[CALIBRATION] is self
        return branches


def needs_experts(options: Options) -> bool:
    """Whether experts or routers are learnt from text."""
    return options.mode == "cluster" or options.router in CALIBRATED


def texts(options: Options) -> list[str]:
    """The texts of a conversion: the files that the choice names, or the second half of Python's language reference.

    Raises:
        FileNotFoundError.
    """
    if options.calibration:
        return [Path(name).expanduser().read_text(encoding="utf-8") for name in options.calibration]
    whole = default_text()
    return [whole[len(whole) // 2 :]]


def default_text() -> str:
    """English prose that every Python installation holds: the topics of `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def digest(options: Options) -> list[str]:
    """Hashes of the texts: another text is another conversion."""
    if not options.reads_text:
        return []
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts(options)]


def calibrate(source: Source, options: Options, fields: dict[str, Any], folder: Path, progress: bool) -> Source:
    """Learn what the choice needs from its texts, unless an interrupted run has, and return the source with it.

    Args:
        fields: of the target's configuration with exact attention.
    Raises:
        ValueError: a text that is too short.
    Cost: a forward pass over `calibration_tokens` tokens in fp32, and k-means in each layer; for a compressed attention
        see `learn_attention`.
    """
    if not options.reads_text:
        return source
    if options.attention == "compress":
        assert options.calibration_tokens is not None
        positions = source.config.get("max_position_embeddings") or ATTENTION_CONTEXT
        context, learnt_rows, measured = rows_of(options.calibration_tokens, positions)
        ids = _ids(source, "\n\n".join(texts(options)), context, learnt_rows + measured, bool(options.calibration))
        learn_attention(source, options, fields, Text(ids, measured), folder, progress)
    path = folder / CALIBRATION_NAME
    if needs_experts(options) and not path.is_file():
        from safetensors.torch import save_file

        learnt = _learn(source, options, list(sparse_layers(fields)), progress)
        partial = folder / f".{CALIBRATION_NAME}"
        save_file(learnt, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    return CalibratedSource(source, folder)


def _learn(source: Source, options: Options, sparse: list[int], progress: bool) -> dict[str, torch.Tensor]:
    learnt: dict[str, torch.Tensor] = {}
    inputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in sparse}

    def observe(layer: int, x: torch.Tensor, contribution: torch.Tensor) -> None:
        if layer not in inputs:
            return
        seed, shared = f"{options.seed}/{layer}", options.shared_shards
        if options.mode == "cluster":
            order = group_neurons(contribution, options.experts, shared, seed)
            learnt[f"layers.{layer}.neurons"] = order
            routed = order[len(order) // options.shards * shared :]
        if options.router == "activity":
            learnt[f"layers.{layer}.router"] = activity_router(x, contribution, routed, options.experts)
        elif options.router == "centroids":
            sets = options.shards - shared if options.mode == "split" else 1
            rows = centroid_router(x, options.experts // sets, seed)
            # Copy by copy where the groups are the shards, else shard by shard.
            rows = rows.repeat(sets, 1) if options.split_scale == "groups" else rows.repeat_interleave(sets, dim=0)
            learnt[f"layers.{layer}.router"] = rows.contiguous()
        elif options.router == "prompts":
            inputs[layer].append(x)

    branches, words = source.branches, texts(options)
    if options.router == "prompts" and len(words) != len(branches):
        raise ValueError(f"router='prompts' needs a text for each of the {len(branches)} sources, got {len(words)}")
    pairs = (
        list(zip(branches, words, strict=True)) if options.router == "prompts" else [(branches[0], "\n\n".join(words))]
    )
    layers = source.config["num_hidden_layers"]
    with step_bar("reading the calibration text", layers * len(pairs), progress) as advance:
        for branch, text in pairs:
            tokens, positions = options.calibration_tokens, branch.config.get("max_position_embeddings")
            assert tokens is not None
            context = min(EXPERTS_CONTEXT, tokens, positions or EXPERTS_CONTEXT)
            ids = _ids(branch, text, context, tokens // context, bool(options.calibration))
            run_by_layers(branch, ids, observe, advance)
    if options.router == "prompts":
        for layer, each in inputs.items():
            rows = mean_router(each, torch.cat(each))
            learnt[f"layers.{layer}.router"] = rows.repeat(options.experts // len(rows), 1)
    return learnt


def _ids(source: Source, text: str, context: int, rows: int, chosen: bool) -> torch.Tensor:
    """Ids (rows, context); random ones where the source has no tokenizer.

    Raises:
        ValueError: a text that is too short, or one that was chosen and cannot be read without a tokenizer.
    """
    from transformers import AutoTokenizer

    tokens = context * rows
    if not source.has_tokenizer():
        if chosen:
            raise ValueError(f"{source.title} has no tokenizer, so the calibration text cannot be read")
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(source.config["vocab_size"], (tokens,), generator=random)
    else:
        tokenizer = AutoTokenizer.from_pretrained(**source.load_arguments())
        ids = tokenizer(text[: tokens * 32], return_tensors="pt", truncation=False, verbose=False)["input_ids"][0]
        if len(ids) < tokens:
            raise ValueError(
                f"the calibration text has {len(ids)} tokens, {tokens} are needed: {rows} rows of {context} for "
                "calibration_tokens"
            )
    return ids[:tokens].view(rows, context)


def run_by_layers(source: Source, ids: torch.Tensor, observe: Observe, advance: Callable[[int], None]) -> None:
    """Show what each MLP sees of a text (B, S).

    Cost: as `DenseLayers.run`, and memory of an MLP's neurons for all tokens.
    """

    def visit(passage: Passage) -> None:
        x, mlp = torch.cat([passage.mlp_input(hidden)[0] for hidden in passage.hidden]), passage.module.mlp
        contribution: list[torch.Tensor] = []

        def down(module: Any, arguments: Any) -> None:
            contribution.append(arguments[0].abs() * module.weight.norm(dim=0))

        hook = mlp.down_proj.register_forward_pre_hook(down)
        mlp(x)
        hook.remove()
        observe(passage.number, x, contribution[0])

    DenseLayers(source).run(ids, visit, advance)


def sparse_layers(config: dict[str, Any]) -> Iterator[int]:
    """Numbers of the layers with experts, of a target's configuration."""
    return (layer for layer, kind in enumerate(config["mlp_layer_types"]) if kind == "sparse")
