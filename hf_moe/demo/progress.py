"""Steps that are done once: an interrupted run goes on after the last finished one."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Progress:
    """Results and seconds of finished steps, kept in a JSON file that is replaced whole after each step.

    Args:
        path: the file; its folder exists.
        settings: what the steps depend on. A file made with other settings is refused.
    Raises:
        ValueError: the file names other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.state: dict[str, Any] = {"settings": settings, "steps": {}}
        if path.exists():
            self.state = json.loads(path.read_text())
            if self.state["settings"] != settings:
                raise ValueError(
                    f"{path.parent} was begun with {self.state['settings']}, now asked for {settings}: "
                    "remove the folder or name another with --output"
                )

    def step(self, name: str, title: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `action` unless it finished before; either way return what it returned then."""
        done = self.state["steps"].get(name)
        if done is not None:
            print(f"\n✓ {title} (done before, {done['seconds']:.0f} s)", flush=True)
            return done["result"]
        print(f"\n▶ {title}", flush=True)
        begin = time.perf_counter()
        result = action()
        self.state["steps"][name] = {"seconds": time.perf_counter() - begin, "result": result}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.state, indent=2))
        os.replace(partial, self.path)
        return result

    def seconds(self, name: str) -> float:
        """How long a finished step took."""
        return self.state["steps"][name]["seconds"]
