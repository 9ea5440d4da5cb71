"""One process at a time writes a target; the system lets go of a lock when its process ends, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lock(descriptor: int, folder: Path) -> None:
    """Lock an open file or folder of the hidden `folder`, until it is closed.

    Raises:
        ValueError: another process has it.
    """
    # Not at the top: Windows has none, and what only reads runs there.
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process is writing this target, in {folder}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder itself.

    Raises:
        ValueError: as `lock`.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)
