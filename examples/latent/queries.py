"""What a bottleneck of the queries costs at half of the cache, and what it saves: SmolLM2-135M, before any training.

    python examples/latent/queries.py                      # 4,096 tokens of Python's language reference, on a CPU

Ways to choose the factors of one rank, the layers' sizes and all else being the same:

    ours         weighted by what the layer reads and by what an error of a query does to the layer's output
    activations  weighted by what the layer reads alone
    weights      truncated SVD of the query projection

Prints a row for each rank and way as it comes.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_moe.cost import attention_parameters
from hf_moe.demo.run import packaged_checkpoint
from hf_moe.upcycling import Options, open_source
from hf_moe.upcycling.budget import allocate
from hf_moe.upcycling.calibration import default_text
from hf_moe.upcycling.compression import Builder, Text, survey
from hf_moe.upcycling.families import family_of
from hf_moe.upcycling.layerwise import DenseLayers, Passage
from hf_moe.upcycling.layout import exact_config
from hf_moe.upcycling.query_bottleneck import Bottleneck, narrow
from hf_moe.upcycling.source_attention import SourceAttention
from hf_moe.upcycling.widths import compressed_fields, limits_of

RATIO = 0.5
RUNS = ((None, "ours"), (384, "ours"), (288, "ours"), (192, "ours"), (288, "activations"), (288, "weights"))


class Unweighted(Builder):
    """Queries without a metric, and without moments of the input where `by_weights`."""

    by_weights = False

    def narrow(self, weight: torch.Tensor, inputs: torch.Tensor, metric: torch.Tensor, rank: int) -> Bottleneck:
        plain = torch.eye(len(inputs), dtype=inputs.dtype) if self.by_weights else inputs
        return narrow(weight, plain, torch.eye(len(metric), dtype=metric.dtype), rank)


class ByWeights(Unweighted):
    """Truncated SVD."""

    by_weights = True


BUILDERS = {"ours": Builder, "activations": Unweighted, "weights": ByWeights}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", type=int, default=4096, help="tokens to learn from")
    parser.add_argument("--measure", type=int, default=2048, help="tokens to measure on")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    dense = open_source(packaged_checkpoint())
    family, fields = family_of(dense.config), exact_config(dense, Options(experts=1))
    limits = limits_of(fields, family.model_type)
    layers = DenseLayers(dense)
    rows, measured = (options.learn + options.measure) // options.context, options.measure // options.context
    tokenizer = AutoTokenizer.from_pretrained(**dense.load_arguments())
    ids = tokenizer(default_text(), return_tensors="pt", verbose=False)["input_ids"][0, : rows * options.context]
    text = Text(ids.view(rows, options.context), measured)

    def source(rank: int | None) -> SourceAttention:
        return SourceAttention(layers, family, {**fields, "q_lora_rank": rank}, limits, 1.0)

    with tempfile.TemporaryDirectory() as folder:
        found = survey(source(None), text, RATIO * limits.numbers, options.seed, Path(folder), lambda _: None)
        sizes = allocate(found.candidates, int(RATIO * limits.numbers * limits.layers))
        builders = [
            BUILDERS[way](source(rank), found, sizes, text, lambda *_: None, seed=options.seed) for rank, way in RUNS
        ]

        def visit(passage: Passage) -> None:
            for builder in builders:
                builder.visit(passage)

        final = layers.run(text.ids, visit, lambda _: None)
    for (rank, way), builder in zip(RUNS, builders, strict=True):
        built = builder.result(final)
        config = compressed_fields(fields, built.widths) | {"q_lora_rank": rank, "q_a_layernorm": False}
        numbers = sum(attention_parameters(config, layer) for layer in range(limits.layers))
        error = sum(row.get("measured_queries", 0.0) for row in built.layers) / limits.layers
        print(
            f"{rank or 'none':>5} {way:12} KL {built.model['kl']:.4f}  top-1 {built.model['top1']:.1%}  "
            f"perplexity {built.model['ppl']:.2f} of {built.model['ppl_source']:.2f}  error of queries {error:.2%}  "
            f"attention {numbers / 1e6:.2f} M"
        )


if __name__ == "__main__":
    main()
