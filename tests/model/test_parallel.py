"""Tensor and pipeline parallelism: two gloo processes against one, for every variant of the model."""

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run_on_ranks
from tiny import VARIANTS, random_ids, tiny_model
from transformers.distributed.configuration_utils import DistributedConfig

from hf_moe import HfMoeForCausalLM
from hf_moe.model.parallel_hf_moe import local_heads

TENSOR = {
    **{name: (name, {}) for name in VARIANTS},
    "one_group_for_two_ranks": ("gqa", {"num_key_value_heads": 1}),
    "norm_over_all_heads": ("head_norms", {"qk_norm": "projection"}),
}


def close(name, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_tensor_parallel(folder, name):
    one = HfMoeForCausalLM.from_pretrained(folder)
    two = HfMoeForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    ids = random_ids(2, 11)
    for model in (one.train(), two.train()):
        model(ids, labels=ids).loss.backward()
    gradients = dict(one.named_parameters())
    for parameter_name, parameter in two.named_parameters():
        if gradients[parameter_name].grad is not None:
            close(f"{name} {parameter_name}", whole(parameter.grad), gradients[parameter_name].grad)
    one.eval(), two.eval()
    with torch.no_grad():
        close(name, two(ids).logits, one(ids).logits)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert two.generate(ids, **options).equal(one.generate(ids, **options)), name


def check_pipeline(folder, name):
    one = HfMoeForCausalLM.from_pretrained(folder)
    two = HfMoeForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2))
    held = [index for index, layer in enumerate(two.model.layers) if len(list(layer.parameters()))]
    assert held == ([0], [1, 2])[dist.get_rank()]
    ids = random_ids(2, 11)
    with torch.no_grad():
        logits = two(ids).logits
        if dist.get_rank() == 1:
            close(name, logits, one(ids).logits)


def check_all(rank, folder, checks):
    dist.init_process_group("gloo")
    for check, name in checks:
        check(f"{folder}/{name}", name)


@needs_gloo
def test_two_processes_equal_one(tmp_path):
    for name, (variant, changes) in TENSOR.items():
        tiny_model(variant, **changes).save_pretrained(tmp_path / name)
    checks = [(check_tensor_parallel, name) for name in TENSOR]
    checks += [(check_pipeline, "deepseek_v3"), (check_pipeline, "gqa")]
    run_on_ranks(check_all, 2, tmp_path, checks)


@pytest.mark.parametrize(
    ("arguments", "heads", "groups"),
    [
        ((8, 4, 2, 1), slice(4, 8), slice(2, 4)),
        ((8, 1, 2, 1), slice(4, 8), slice(0, 1)),
        ((8, 2, 4, 1), slice(2, 4), slice(0, 1)),
        ((8, 2, 4, 3), slice(6, 8), slice(1, 2)),
    ],
)
def test_heads_and_groups_of_a_rank(arguments, heads, groups):
    assert local_heads(*arguments) == (heads, groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 3, 2, 0), "num_attention_heads=9 is not divisible by the tensor-parallel size 2"),
        ((12, 4, 6, 0), "2 of num_attention_heads=12, which is neither .* of the 3 heads"),
    ],
)
def test_heads_that_do_not_divide(arguments, message):
    with pytest.raises(ValueError, match=message):
        local_heads(*arguments)
