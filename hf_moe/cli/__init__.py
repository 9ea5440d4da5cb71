"""The command line: `hf-moe`. Each command is thin and imports inside of it what it needs.

Nothing heavy stands at the top: `hf_moe_command` starts this module without the package's own import, which
`one_sentence` makes up for where a command loads models.
"""

# The modules' commands enter `app` when they are imported.
from . import conversion, exchange, experts, healing
from .app import app, one_sentence

__all__ = ["app", "conversion", "exchange", "experts", "healing", "one_sentence"]
