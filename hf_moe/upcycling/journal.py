"""The record of a conversion that is under way: one line for each finished tensor, with its hash.

Line 1 names the plan. A line is appended after the tensor's bytes, so a line without bytes cannot be; bytes without a
line are written again.
"""

import json
import os
from pathlib import Path
from typing import Any

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """Append-only, held by one process at a time.

    Raises:
        ValueError: another process writes the same target.
    """

    def __init__(self, folder: Path, digest: str):
        # Not at the top: Windows has none, and what only reads runs there.
        import fcntl

        self._file = (folder / JOURNAL_NAME).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"another process is writing this target, in {folder}") from error
        self.digest = digest
        self.entries: list[dict[str, Any]] = []

    def resume(self) -> bool:
        """Load the finished lines of an earlier run of the same plan; False, and an empty journal, without one."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        try:
            same = json.loads(lines[0])["plan"] == self.digest
        except (ValueError, KeyError, TypeError):
            same = False
        if same:
            # A line that was cut by the end of the process, and all that would follow, does not count.
            for line in lines[1:-1]:
                try:
                    self.entries.append(json.loads(line))
                except ValueError:
                    break
        self.rewrite(self.entries)
        return same

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Keep only these entries."""
        self._file.seek(0)
        self._file.truncate()
        self.entries = []
        self._append({"plan": self.digest})
        for entry in entries:
            self.add(entry)

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished tensor."""
        self._append(entry)
        self.entries.append(entry)

    def _append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, sort_keys=True).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was recorded survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()
