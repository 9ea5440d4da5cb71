"""Training: the balance of experts, measured, logged and kept."""

from .balance import SelectionBiasCallback, move_selection_bias, use_selection_bias
from .load import ExpertLoad, RoutingCounter, measure_expert_load
from .metrics import ExpertLoadCallback, load_metrics

__all__ = [
    "ExpertLoad",
    "ExpertLoadCallback",
    "RoutingCounter",
    "SelectionBiasCallback",
    "load_metrics",
    "measure_expert_load",
    "move_selection_bias",
    "use_selection_bias",
]
