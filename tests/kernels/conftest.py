"""Where the kernels run decides which tests are collected.

`triton/` holds the tests of the kernels themselves. Triton chooses between its compiler and its interpreter when it is
imported, so on a machine without a GPU `test_interpreter.py` runs those files in processes of their own, with
TRITON_INTERPRET=1.
"""

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]
