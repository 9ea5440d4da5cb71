"""A later Transformers without one of its inner parts that this model uses: only what needs the part stops, by name."""

import os
import re
import subprocess
import sys

import pytest

# A registry of styles without one, modules without a class, a class without the method that is overridden.
WITHOUT_PARTS = """
import torch
import transformers.distributed.tensor_parallel as tensor_parallel
import transformers.integrations.finegrained_fp8 as fp8
tensor_parallel.ALL_PARALLEL_STYLES._global_mapping.pop("local_params")
del tensor_parallel.LocalParamsParallel, fp8.Fp8Dequantize
"""
WITHOUT_REGISTRY = """
import transformers.modeling_utils
import transformers.distributed.parallel_utils as parallel_utils
del parallel_utils.ALL_PARALLEL_STYLES, parallel_utils._AllReduceBackward
"""
WITHOUT_METHOD = """
import transformers.integrations.finegrained_fp8 as fp8
del fp8.Fp8Dequantize._dequantize_one
"""
BUILD = """
import torch, hf_moe
from hf_moe.model.parallel_hf_moe import LatentAttentionHeads
from hf_moe.model.translation_hf_moe import translate
sizes = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, first_k_dense_replace=1)
config = hf_moe.HfMoeConfig(**sizes)
model = hf_moe.HfMoeForCausalLM(config)
print(model(torch.arange(4)[None]).logits.shape)
class Mesh:
    size, get_local_rank, get_group = (lambda self: 2), (lambda self: 0), (lambda self: None)
fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
for use in (
    lambda: LatentAttentionHeads().install_forward(model.model.layers[0].self_attn, Mesh()),
    lambda: translate({"model_type": "deepseek_v3", "quantization_config": fp8}),
):
    try:
        use()
        print("works")
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("without", "parallel", "fp8"),
    [
        (WITHOUT_PARTS, "ImportError tensor parallelism .* 'local_params'", "ImportError an FP8 .* 'Fp8Dequantize'"),
        (WITHOUT_REGISTRY, "ImportError tensor parallelism .* 'local_params'", "works"),
        (WITHOUT_METHOD, "works", "ImportError an FP8 .*Fp8Dequantize has no _dequantize_one"),
    ],
)
def test_only_what_needs_the_part_stops(without, parallel, fp8):
    code = f"{without}\n{BUILD}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, tensor_parallel, checkpoint = done.stdout.splitlines()
    assert shape == "torch.Size([1, 4, 9])"
    assert re.match(parallel, tensor_parallel)
    assert re.match(fp8, checkpoint)
