"""Heat maps of expert load. They need matplotlib, which the package does not."""

import importlib.util
from pathlib import Path
from typing import Any

import torch


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _heat_map(
    values: torch.Tensor, x: str, y: str, title: str, path: Path, span: tuple[float, float], extent: Any = None
) -> None:
    # A figure of its own and not pyplot's, which would ask for a display.
    from matplotlib.figure import Figure

    height, width = values.shape
    figure = Figure(figsize=(min(16, max(5, 2 + width / 4)), min(12, max(3, 1.5 + height / 5))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        values.numpy(), aspect="auto", vmin=span[0], vmax=span[1], interpolation="nearest", extent=extent
    )
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)


def draw_load(share: torch.Tensor, path: Path, title: str = "load over the mean, all of training") -> None:
    """Layers by experts: each expert's load over the mean of its layer, (L, E) shares in."""
    load = share * share.shape[1]
    _heat_map(load, "expert", "sparse layer", title, path, (0.0, max(2.0, float(load.max()))))


def draw_balance(log_history: list[dict[str, Any]], path: Path) -> None:
    """Layers by steps: the busiest expert over the mean, as logged for each layer; nothing where it was not."""
    name = "experts/layer_{:02d}/max_over_mean"
    entries = [entry for entry in log_history if name.format(0) in entry]
    if not entries:
        return
    layers = sum(key.endswith("/max_over_mean") for key in entries[0]) - 1
    values = torch.tensor([[entry[name.format(layer)] for entry in entries] for layer in range(layers)])
    extent = (entries[0]["step"], max(entries[-1]["step"], entries[0]["step"] + 1), layers - 0.5, -0.5)
    _heat_map(
        values,
        "step",
        "sparse layer",
        "busiest expert over the mean",
        path,
        (1.0, max(2.0, float(values.max()))),
        extent,
    )
