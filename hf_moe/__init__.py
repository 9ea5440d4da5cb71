"""hf_moe: latent-attention mixtures of experts for Hugging Face Transformers.

Importing the package registers the model with Transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` knows `model_type: "hf_moe"`, and the expert kernels as
`experts_implementation="hf_moe_triton"`. Triton itself is imported at the first call on a GPU.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from .kernels.experts import accelerate, restore
from .kernels.experts import register as register_experts
from .kernels.inference import register as register_inference
from .model import (
    HfMoeConfig,
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)

__version__ = "0.1.0"


def _register() -> None:
    """Enter the classes in Transformers' registries, and their names in the tables that `register` leaves alone."""
    AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
    classes = {
        AutoModel: (HfMoeModel, modeling_auto.MODEL_MAPPING_NAMES),
        AutoModelForCausalLM: (HfMoeForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        AutoModelForSequenceClassification: (
            HfMoeForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
        AutoModelForTokenClassification: (
            HfMoeForTokenClassification,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ),
        AutoModelForQuestionAnswering: (
            HfMoeForQuestionAnswering,
            modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        ),
    }
    for auto_class, (model_class, names) in classes.items():
        auto_class.register(HfMoeConfig, model_class, exist_ok=True)
        # Label smoothing and others look the class up by name here; without the entry they train on unshifted labels.
        names.setdefault(HfMoeConfig.model_type, model_class.__name__)


_register()
register_experts()
register_inference()

__all__ = [
    "HfMoeConfig",
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "accelerate",
    "restore",
]
