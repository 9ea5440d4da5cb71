"""Stands in for a module that the source distribution lacks: starts ranks that meet over gloo on this machine."""

import functools
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Ranks fork from a server that has imported everything once and run nothing: a rank starts in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hf_moe", "tests.test_fsdp_mixin", "tests.test_expert_parallel_mixin"])
TIMEOUT_SECONDS = 240


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass


def _rank_main(function: Callable, rank: int, args: tuple, errors: Any) -> None:
    torch.set_num_threads(1)
    try:
        function(rank, *args)
    except BaseException:
        errors.put((rank, traceback.format_exc()[-20_000:]))
        raise


def _start_rank_processes(function: Callable, args: tuple = (), nprocs: int = 1) -> None:
    """Call `function(rank, *args)` in `nprocs` processes and wait for all of them.

    Raises:
        RuntimeError: a rank raised (with its traceback), or all did not end within TIMEOUT_SECONDS.
    """
    errors = CONTEXT.SimpleQueue()
    ranks = [CONTEXT.Process(target=_rank_main, args=(function, rank, args, errors)) for rank in range(nprocs)]
    for process in ranks:
        process.start()
    pending = {process.sentinel: process for process in ranks}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while pending:
            ended = multiprocessing.connection.wait(list(pending), deadline - time.monotonic())
            if not ended:
                raise RuntimeError(f"ranks did not end within {TIMEOUT_SECONDS} s")
            for sentinel in ended:
                process = pending.pop(sentinel)
                process.join()
                if process.exitcode:
                    cause = f"exit code {process.exitcode}" if errors.empty() else "rank {}:\n{}".format(*errors.get())
                    raise RuntimeError(f"a rank failed: {cause}")
    finally:
        for process in pending.values():
            process.kill()
            process.join()


def _rendezvous_and_call(rank: int, function: Callable, world_size: int, port: int, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    store = dist.TCPStore("localhost", port, world_size=None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """Decorator: call the function as `function(rank, *args)` in `world_size` ranks of one process group."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any) -> None:
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_rank_processes(_rendezvous_and_call, (function, world_size, store.port, args), world_size)

        return run

    return decorate
