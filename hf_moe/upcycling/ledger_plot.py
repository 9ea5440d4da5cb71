"""The ledger as a picture: quality over cache bytes, and what each layer kept."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

PLOT_NAME = "ledger.png"


def draw_ledger(ledger: dict[str, Any], item: int, path: Path) -> None:
    """Predicted KL over the cache's bytes a token with what was measured, beside the layers' numbers.

    Args:
        item: bytes of a cached number.
    Does nothing where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    # A figure of its own and not pyplot's, which would ask for a display.
    figure = Figure(figsize=(10, 4), layout="constrained")
    cost, sizes = figure.subplots(1, 2)
    # The whole cache costs nothing, which a logarithm cannot show, and rounding would.
    points = [point for point in ledger["curve"] if point["predicted_kl"] > 1e-7]
    cost.plot([p["cache_numbers"] * item for p in points], [p["predicted_kl"] for p in points], label="predicted")
    cost.plot(ledger["cache_numbers"] * item, ledger["model"]["kl"], "o", label="this model, measured")
    cost.axvline(ledger["cache_numbers_source"] * item, color="gray", linestyle=":", label="the source: 0")
    cost.set(xlabel="cache bytes a token", ylabel="KL from the source, nats a token", yscale="log")
    cost.grid(alpha=0.3)
    cost.legend()
    layers = [row["layer"] for row in ledger["layers"]]
    latents = [row["latent"] for row in ledger["layers"]]
    sizes.bar(layers, latents, label="latent")
    rotary = [row["cache_numbers"] - row["latent"] for row in ledger["layers"]]
    sizes.bar(layers, rotary, bottom=latents, label="rotary keys")
    sizes.set(xlabel="layer", ylabel="cached numbers a token")
    sizes.legend()
    # Without the library's version, so that bytes are those of any run.
    figure.savefig(path, dpi=110, metadata={"Software": None})
