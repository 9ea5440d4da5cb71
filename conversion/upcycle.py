"""Convert a dense checkpoint and prove the result: `python conversion/upcycle.py SOURCE OUT`."""

import argparse

from hf_moe.upcycling import upcycle, verify

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder of safetensors, .gguf file or Hub id")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--mode", default="copy")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    arguments = parser.parse_args()
    upcycle(arguments.source, arguments.out, mode=arguments.mode, experts=arguments.experts, top_k=arguments.top_k)
    verify(arguments.source, arguments.out)
