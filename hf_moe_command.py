"""The `hf-moe` command. It stands outside of the package, whose own import registers the model with Transformers and so
imports torch: seconds that help, a misspelt option and `hf-moe plan` need not wait for.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported is one word, not a traceback."""
    try:
        enter_package()
        from hf_moe.cli import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        sys.exit(130)


def enter_package() -> None:
    """Make `hf_moe` importable with its `__init__` unread; `hf_moe.cli` reads it for commands that load a model."""
    spec = find_spec("hf_moe")
    assert spec is not None
    sys.modules.setdefault("hf_moe", module_from_spec(spec))


if __name__ == "__main__":
    main()
