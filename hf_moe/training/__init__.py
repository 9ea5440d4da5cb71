"""Training: the balance of experts, measured, logged and kept; optimizers."""

from .balance import GlobalLoadCallback, SelectionBiasCallback, move_selection_bias, use_selection_bias
from .load import ExpertLoad, RoutingCounter, measure_expert_load
from .metrics import ExpertLoadCallback, load_metrics
from .optimizers import MuonAdamW, orthogonalize, parameter_groups

__all__ = [
    "ExpertLoad",
    "ExpertLoadCallback",
    "GlobalLoadCallback",
    "MuonAdamW",
    "RoutingCounter",
    "SelectionBiasCallback",
    "load_metrics",
    "measure_expert_load",
    "move_selection_bias",
    "orthogonalize",
    "parameter_groups",
    "use_selection_bias",
]
