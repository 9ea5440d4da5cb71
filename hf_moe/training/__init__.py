"""Training: how evenly experts are used, measured while a model runs."""

from .load import ExpertLoad, measure_expert_load

__all__ = ["ExpertLoad", "measure_expert_load"]
