"""A dynamic cache with room to grow against Transformers' own, whatever is done to it."""

import copy

import pytest
import torch
from tiny import random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_moe.model.growing_hf_moe import GrowingLayer, grow_in_place


def tokens(count: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    latent, k_rot = (torch.randn(batch, 1, count, width, generator=generator).to(dtype) for width in (6, 4))
    return latent, k_rot


CHANGES = {
    "nothing": lambda layer: None,
    "crop": lambda layer: layer.crop(-3),
    "crop all": lambda layer: layer.crop(-300),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0])),
    "reset": lambda layer: layer.reset(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("first", [1, 255, 300])
def test_equals_transformers_layer(change, first):
    ours, theirs = GrowingLayer(), DynamicLayer()
    for step in (first, 1, 2, change, 1, 7, 1, change, 1):
        if not isinstance(step, int):
            ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
            for layer in (ours, theirs):
                step(layer)
            continue
        batch = 2 if theirs.get_seq_length() == 0 else theirs.keys.shape[0]
        given = tokens(step, batch)
        for got, expected in zip(ours.update(*given), theirs.update(*given), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_tensors_of_another_kind_are_not_squeezed_into_its_room():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*tokens(3))
    with torch.no_grad():
        layer.update(*tokens(1))
        keys, _ = layer.update(*tokens(2, dtype=torch.float64))
    assert torch.equal(keys[:, :, 4:], tokens(2, dtype=torch.float64)[0])
    latent, k_rot = (x.requires_grad_() for x in tokens(2))
    keys, values = layer.update(latent, k_rot)
    (keys[:, :, -2:].sum() + values.sum()).backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))
    assert torch.equal(k_rot.grad, torch.ones_like(k_rot))


class Written(TorchDispatchMode):
    """Numbers that `cat` has written."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::cat":
            self.numbers = max(self.numbers, out.numel())
        return out


@torch.no_grad()
def test_generate_takes_it_and_copies_nothing(variant):
    model, ids = tiny_model(variant), random_ids(2, 90)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    cache = out.past_key_values
    for layer, kind in zip(cache.layers, model.config.layer_types, strict=True):
        assert (type(layer) is GrowingLayer) == (kind == "full_attention")
    with Written() as written:
        model(out.sequences[:, -1:], past_key_values=cache)
    assert written.numbers < 2 * 90 * min(model.config.kv_lora_ranks or [model.config.kv_lora_rank])


def test_caches_of_other_kinds_stay_as_they_are():
    class Own(DynamicCache):
        pass

    config = tiny_model("deepseek_v3").config
    for cache in (Own(config=config), None):
        grow_in_place(cache)
        assert cache is None or {type(layer) for layer in cache.layers} == {DynamicLayer}
