"""`generate` through captured steps; in place of a CUDA graph stands one that runs the recorded call again."""

import pytest
import torch
from tiny import VARIANTS, random_ids, tiny_model
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from hf_moe.model.generation_hf_moe import CapturedStep, mask_of_one_token


class Recorder:
    """Takes the place of a CUDA graph."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, call):
        self.captures += 1
        outputs = MoeCausalLMOutputWithPast()

        def replay():
            self.replays += 1
            for name, value in call().items():
                setattr(outputs, name, value)

        return replay, outputs


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()

    def use(model):
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
        monkeypatch.setattr(model, "get_compiled_call", lambda _: CapturedStep(model, recorder))
        return recorder

    return use


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("padding", [0, 3])
def test_captured_steps_give_the_same_tokens(name, padding, recorder):
    model = tiny_model(name).eval()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    used = recorder(model)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    if set(model.config.layer_types) == {"full_attention"}:
        # Of seven steps after the prompt's the first runs as it is, and one capture serves the others.
        assert (used.captures, used.replays) == (1, 6)
    else:
        assert used.captures == 0


def test_what_cannot_be_captured_runs_as_it_is(recorder):
    model = tiny_model(next(iter(VARIANTS))).eval()
    used = recorder(model)
    ids = random_ids(1, 5)
    out = model.generate(
        ids, max_new_tokens=4, do_sample=False, cache_implementation="static", output_hidden_states=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert len(out.hidden_states) == 4
    assert used.captures == 0


def test_mask_of_one_token_is_transformers_mask():
    model = tiny_model(next(iter(VARIANTS))).eval()
    cache = StaticCache(config=model.config, max_cache_len=12)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :2] = 0
    with torch.no_grad():
        model(random_ids(2, 7), attention_mask=mask[:, :7], past_key_values=cache)
    token = torch.empty(2, 1, 0)
    expected = create_masks_for_generate(model.config, token, mask, cache)["full_attention"]
    assert torch.equal(mask_of_one_token(cache, mask, token).expand_as(expected), expected)
