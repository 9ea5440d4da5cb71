"""Convert a dense checkpoint and prove the result: `python conversion/upcycle.py SOURCE OUT`."""

import argparse

import typer

from hf_moe.cli import one_sentence
from hf_moe.upcycling import upcycle, verify

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder of safetensors, .gguf file or Hub id")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--mode", default="copy")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int)
    arguments = parser.parse_args()
    with one_sentence(resumable=True):
        upcycle(arguments.source, arguments.out, mode=arguments.mode, experts=arguments.experts, top_k=arguments.top_k)
    with one_sentence():
        certificate = verify(arguments.source, arguments.out)
        typer.echo(
            f"{arguments.out}: max |Δlogit| {certificate['logits']['max_abs_difference']:.2e}, see certificate.json"
        )
