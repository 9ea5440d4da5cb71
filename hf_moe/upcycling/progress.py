"""Progress bars: bytes or steps done, speed and time left, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def byte_bar(description: str, total: int, shown: bool) -> Iterator[Advance]:
    """A bar over `total` bytes; yields the function that advances it. Nothing is drawn unless `shown`."""
    from rich import progress as columns

    with _bar(
        shown,
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.DownloadColumn(),
        columns.TransferSpeedColumn(),
        columns.TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def step_bar(description: str, total: int, shown: bool) -> Iterator[Advance]:
    """A bar over `total` steps; yields the function that advances it. Nothing is drawn unless `shown`."""
    from rich import progress as columns

    with _bar(
        shown,
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.MofNCompleteColumn(),
        columns.TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _bar(shown, *columns):
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), disable=not shown)
