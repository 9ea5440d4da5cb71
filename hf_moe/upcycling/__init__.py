"""Upcycling: a dense checkpoint into a latent-attention mixture of experts, and the proof that nothing was lost.

from hf_moe.upcycling import upcycle, verify
upcycle("SOURCE", "OUT", mode="copy", experts=4, top_k=2)
verify("SOURCE", "OUT")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import upcycle
    from .exchange import export, import_mixture
    from .healed import heal
    from .layout import make_plan
    from .options import Options
    from .plan import Plan
    from .publish import push
    from .sources import open_source
    from .verification import VerificationError, verify

_HOMES = {
    "Options": "options",
    "Plan": "plan",
    "VerificationError": "verification",
    "export": "exchange",
    "heal": "healed",
    "import_mixture": "exchange",
    "make_plan": "layout",
    "open_source": "sources",
    "push": "publish",
    "upcycle": "convert",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # A plan is made without torch, so nothing here may import it before it is asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = [
    "Options",
    "Plan",
    "VerificationError",
    "export",
    "heal",
    "import_mixture",
    "make_plan",
    "open_source",
    "push",
    "upcycle",
    "verify",
]
