"""The demonstration behind `hf-moe demo`: a real dense model, upcycled, verified, fine-tuned, heard and reported."""

from .run import run_demo

__all__ = ["run_demo"]
