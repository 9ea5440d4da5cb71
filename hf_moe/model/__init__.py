"""The sealed model: these files are copied to the Hub beside the weights, so they import only each other."""

from .configuration_hf_moe import HfMoeConfig
from .modeling_hf_moe import (
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    HfMoePreTrainedModel,
)

__all__ = [
    "HfMoeConfig",
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "HfMoePreTrainedModel",
]
