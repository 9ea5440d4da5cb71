"""The record of a conversion that is under way: one line for each finished tensor, with its hash.

Line 1 names the plan. A line is appended after the tensor's bytes, so a line without bytes cannot be; bytes without a
line are written again.
"""

import json
import os
from pathlib import Path
from typing import Any

from .lock import lock

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """Append-only, held by one process at a time.

    Raises:
        ValueError: another process writes the same target.
    """

    def __init__(self, folder: Path, digest: str):
        self._file = (folder / JOURNAL_NAME).open("a+b")
        try:
            lock(self._file.fileno(), folder)
        except ValueError:
            self._file.close()
            raise
        self.digest = digest
        self.entries: list[dict[str, Any]] = []
        # Where the line of the plan ends in the file, and that of each entry.
        self._ends: list[int] = []

    def resume(self) -> bool:
        """Load the finished lines of an earlier run of the same plan; False, and the file as it was, without one."""
        self._file.seek(0)
        # What the end of the process has cut is no line.
        head, *lines = self._file.read().splitlines(keepends=True) or [b""]
        try:
            same = head.endswith(b"\n") and json.loads(head)["plan"] == self.digest
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            return False
        self._ends = [len(head)]
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if entry is None:
                break
            self.entries.append(entry)
            self._ends.append(self._ends[-1] + len(line))
        self.keep(len(self.entries))
        return True

    def begin(self) -> None:
        """An empty journal of this plan, whatever was there."""
        self._file.truncate(0)
        self.entries, self._ends = [], []
        self._append({"plan": self.digest})

    def keep(self, count: int) -> None:
        """Keep only the first entries."""
        # One call: a process that is killed here loses no finished line.
        self._file.truncate(self._ends[count])
        del self.entries[count:], self._ends[count + 1 :]

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished tensor."""
        self._append(entry)
        self.entries.append(entry)

    def _append(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, sort_keys=True).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))

    def sync(self) -> None:
        """Make what was recorded survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()
