"""Work on several gloo ranks at once, as one call that ends: with the result, the first rank's error, or the time."""

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def run_on_ranks(work: Callable[..., None], world_size: int, *arguments: Any, seconds: float = 200) -> None:
    """Call `work(rank, *arguments)` in `world_size` fresh processes that know each other as torchrun's do.

    The work, or what it calls, starts the process group. A rank that raises fails the test with its traceback; ranks
    that are not done in time are killed and fail it too.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    errors = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(_rank, (work, world_size, port, arguments, errors), nprocs=world_size, join=False)
    end = time.monotonic() + seconds
    try:
        while not ranks.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                pytest.fail(f"{work.__name__} on {world_size} ranks did not end in {seconds} s")
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        pytest.fail(str(error) if errors.empty() else errors.get())
    finally:
        for process in ranks.processes:
            process.kill()


def _rank(rank: int, work: Callable[..., None], world_size: int, port: int, arguments: tuple, errors: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    try:
        work(rank, *arguments)
    except BaseException:
        errors.put(traceback.format_exc()[-20_000:])
        # Not `raise`: the traceback keeps a DistributedDataParallel alive, see below.
        os._exit(1)
    # The order matters. A DistributedDataParallel's reducer frees its process group holding Python's lock, and that
    # waits for gloo's thread, which wants the lock to free a tensor. While torch still holds the group, nobody waits.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
