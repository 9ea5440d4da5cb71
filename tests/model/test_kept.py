"""What `generate` keeps for its next call: used again where nothing has changed, and gone when it should be."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_ids, tiny_model
from torch import nn

from hf_moe.model import kept_hf_moe
from hf_moe.model.generation_hf_moe import rounded


def greedy(model, ids, **more):
    choices = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, **choices | more)


def padded(length, padding, seed):
    ids = random_ids(2, length, seed)
    ids[0, :padding] = 0
    return ids


def kept(model):
    return kept_hf_moe._KEPT.get(model)


def test_one_capture_serves_all_calls(variant, recorder):
    model = tiny_model(variant)
    prompts = [padded(*shape, seed) for seed, shape in enumerate([(9, 0), (3, 1), (40, 5), (9, 3)])]
    expected = [greedy(model, ids) for ids in prompts]
    recorder.on()
    assert all(torch.equal(greedy(model, ids), out) for ids, out in zip(prompts, expected, strict=True))
    assert (recorder.captures, recorder.replays) == (1, 6 + 3 * 7)


def test_room_for_longer_texts():
    for length in (*range(1, 5000, 7), 2**16, 2**16 + 1, 131071):
        assert length <= rounded(length) <= length + max(255, length / 8)


def test_sampling_and_ends_leave_no_trace(variant, recorder):
    model, ids = tiny_model(variant), random_ids(2, 9)
    choices = {"do_sample": True, "top_k": 20, "pad_token_id": 0, "eos_token_id": list(range(40, 60))}

    def answers():
        torch.manual_seed(1)
        return [greedy(model, ids, **choices), greedy(model, ids), greedy(model, ids[:, :4], **choices)]

    expected = answers()
    recorder.on()
    # The first and the last token are drawn alike; the random generator has seen one more step where a text ended.
    assert torch.equal(answers()[1], expected[1])
    assert recorder.captures == 1


CHANGES = {
    "another batch": lambda model: None,
    "a longer text": lambda model: None,
    "new weights": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.flip(0))),
    "a hook": lambda model: model.lm_head.register_forward_hook(lambda module, args, out: out.flip(-1)),
    "another forward": lambda model: setattr(model.lm_head, "forward", lambda x: -nn.Linear.forward(model.lm_head, x)),
    "a number": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 3.0),
    "the configuration": lambda model: setattr(model.config, "logits_scaling", -1.0),
    "bfloat16": lambda model: model.bfloat16(),
    "other experts": lambda model: model.set_experts_implementation("batched_mm"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_captured_anew(change, recorder):
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    greedy(model, ids)
    before = kept(model)
    assert before is not None
    CHANGES[change](model)
    if change == "another batch":
        ids = random_ids(3, 9)
    if change == "a longer text":
        ids = random_ids(2, 260)
    recorder.off()
    expected = greedy(model, ids)
    recorder.on()
    assert torch.equal(greedy(model, ids), expected)
    assert kept(model) is not before


def test_inference_mode_and_no_grad_take_turns(recorder):
    model, ids = tiny_model(), random_ids(2, 9)
    expected = greedy(model, ids)
    recorder.on()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(greedy(model, ids), expected)
    assert recorder.captures == 3


def test_nothing_is_kept_under_autocast(recorder):
    """It frees its copies of the weights where it ends."""
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    for calls in (1, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            greedy(model, ids)
        assert kept(model) is None
        assert recorder.captures == calls


def test_recorders_of_hidden_states_are_no_change(recorder):
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    with torch.no_grad():
        model(ids, output_hidden_states=True, output_router_logits=True)
    expected = greedy(model, ids, disable_compile=True)
    assert all(torch.equal(greedy(model, ids), expected) for _ in range(2))
    assert recorder.captures == 1


def test_weights_changed_in_place_need_no_new_capture(recorder):
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    greedy(model, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(-2)
    recorder.off()
    expected = greedy(model, ids)
    recorder.on()
    assert torch.equal(greedy(model, ids), expected)
    assert recorder.captures == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_is_kept_under_adapters(recorder):
    base, ids = tiny_model(), random_ids(2, 9)
    model = get_peft_model(base, LoraConfig(target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    expected = {True: greedy(model, ids)}
    with model.disable_adapter():
        expected[False] = greedy(model, ids)
    recorder.on()
    for _ in range(2):
        assert torch.equal(greedy(model, ids), expected[True])
        with model.disable_adapter():
            assert torch.equal(greedy(model, ids), expected[False])
    assert kept(base) is None


FREEING = {
    "free": lambda model: model.free_generation_memory(),
    "train": lambda model: model.train(),
    "to": lambda model: model.to("cpu"),
    "collected": None,
}


@pytest.mark.parametrize("way", FREEING.values(), ids=FREEING)
def test_memory_is_freed(way, recorder):
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    greedy(model, ids)
    model.eval()
    # The stand-in's closure holds the model, as no graph does.
    kept(model).step.replay = None
    slots = weakref.ref(kept(model).layers[0].keys)
    if way is None:
        del model
    else:
        way(model)
    gc.collect()
    assert slots() is None


def test_a_large_cache_is_not_kept(recorder, monkeypatch):
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**16))
    greedy(model, ids)
    assert kept(model) is None


def test_a_call_that_failed_leaves_nothing(recorder):
    model, ids = tiny_model("sandwich"), random_ids(2, 9)
    expected = greedy(model, ids)

    def fail(input_ids, scores):
        if input_ids.shape[1] == 13:
            raise KeyboardInterrupt
        return scores

    recorder.on()
    greedy(model, ids)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids, logits_processor=[fail])
    assert kept(model) is None
    assert torch.equal(greedy(model, ids), expected)


def test_a_cache_that_is_returned_is_the_callers(variant, recorder):
    model, ids = tiny_model(variant), random_ids(1, 9)
    longer = torch.cat((greedy(model, ids), random_ids(1, 3)), dim=1)
    expected = greedy(model, longer)
    recorder.on()
    greedy(model, ids)
    first = greedy(model, ids, return_dict_in_generate=True)
    assert kept(model) is None
    greedy(model, random_ids(1, 12, seed=8))
    for cache in (pickle.loads(pickle.dumps(first.past_key_values)), copy.deepcopy(first.past_key_values)):
        assert torch.equal(greedy(model, longer, past_key_values=cache), expected)


def test_models_are_copied_and_saved_without_it(recorder):
    model, ids = tiny_model(), random_ids(2, 9)
    recorder.on()
    expected = greedy(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(other) is None
        assert torch.equal(greedy(other, ids), expected)


def test_threads_do_not_share_it(recorder):
    model = tiny_model("sandwich")
    prompts = [random_ids(2, 9, seed) for seed in range(4)]
    expected, found = [greedy(model, ids) for ids in prompts], [None] * 4
    recorder.on()

    def work(i):
        with torch.no_grad():
            found[i] = greedy(model, prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_returned_cache_grows_with_its_conversation(variant, recorder):
    model, ids = tiny_model(variant), random_ids(1, 9)
    longer = torch.cat((greedy(model, ids), random_ids(1, rounded(1))), dim=1)
    expected = greedy(model, longer, max_new_tokens=30)
    recorder.on()
    cache = greedy(model, ids, return_dict_in_generate=True).past_key_values
    assert cache.length < longer.shape[1]
    found = greedy(model, longer, max_new_tokens=30, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.past_key_values is cache
    assert recorder.replays == 6 + 28
