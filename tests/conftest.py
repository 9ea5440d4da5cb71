"""What all tests share: a process that never reaches for the network, and the variants of the tiny model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import VARIANTS

# Run by `make transformers-suite`, and its stand-ins are named as Transformers' own tests are.
collect_ignore = ["transformers_suite"]

# Tiny tensors: more threads only wait for each other, the more so beside other test processes.
torch.set_num_threads(1)


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    """Each variant of the tiny model in turn."""
    return request.param
