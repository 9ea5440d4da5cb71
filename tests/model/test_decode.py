"""`generate` by replayed steps, on a CPU; in place of a CUDA graph stands a call that is run again."""

import pytest
import torch
from test_configuration import ROPES
from tiny import VARIANTS, random_ids, tiny_model
from transformers import GenerationConfig, StaticCache
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.view(-1).tolist())

    def end(self):
        self.ended = True


def options(ids, padding=0, **more):
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | more


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("padding", [0, 3])
def test_replayed_steps_give_the_same_tokens(name, padding, recorder):
    model, ids = tiny_model(name).eval(), random_ids(2, 9)
    expected = model.generate(ids, **options(ids, padding))
    recorder.on()
    assert torch.equal(model.generate(ids, cache_implementation="static", **options(ids, padding)), expected)
    # Of seven steps after the prompt's the first runs as it is, and one capture serves the others.
    assert (recorder.captures, recorder.replays) == (1, 6)


def test_sampling_with_processors_draws_the_same_tokens(recorder):
    model, ids = tiny_model(next(iter(VARIANTS))).eval(), random_ids(2, 9)
    more = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3}
    torch.manual_seed(1)
    expected = model.generate(ids, **options(ids, **more))
    recorder.on()
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options(ids, **more)), expected)


@pytest.mark.parametrize(("end_of_first", "end_of_second"), [(2, 4), (4, 4), (0, 0), (6, 7)])
def test_ends_are_seen_one_step_late_and_leave_no_trace(variant, end_of_first, end_of_second, recorder):
    model, ids = tiny_model(variant), random_ids(2, 9)
    free = model.generate(ids, **options(ids))
    ends = [int(free[0, 9 + end_of_first]), int(free[1, 9 + end_of_second])]
    choices = options(ids, eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True)
    expected = model.generate(ids, **choices)
    recorder.on()
    cache = StaticCache(config=model.config, max_cache_len=32)
    out = model.generate(ids, past_key_values=cache, **choices)
    assert torch.equal(out.sequences, expected.sequences)
    seen = {int(layer.get_seq_length()) for layer in out.past_key_values.layers}
    assert seen == {expected.past_key_values.get_seq_length()}


def test_a_streamer_hears_every_token_once(recorder):
    model, ids = tiny_model(next(iter(VARIANTS))).eval(), random_ids(1, 9)
    for end in (None, int(model.generate(ids, **options(ids))[0, 12])):
        expected, heard = Heard(), Heard()
        choices = options(ids, eos_token_id=end, pad_token_id=0)
        recorder.off()
        model.generate(ids, streamer=expected, **choices)
        recorder.on()
        model.generate(ids, streamer=heard, cache_implementation="static", **choices)
        assert heard.tokens == expected.tokens
        assert heard.ended


@pytest.mark.parametrize("length", [3, 12])
def test_a_prefix_in_a_static_cache_is_continued(variant, length, recorder):
    model, ids = tiny_model(variant), random_ids(1, 19)
    expected = model.generate(ids, **options(ids))
    recorder.on()
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options(ids)), expected)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("first", [2, 9])
def test_a_conversation_goes_on_in_a_static_cache(variant, first, ends, recorder):
    """Its windows are filled, or not yet, when steps begin and when they end."""
    model, ids = tiny_model(variant), random_ids(1, first)
    turns = []
    for length in (1, 4, 7):
        last = int(model.generate(ids, **options(ids, max_new_tokens=3))[0, -1]) if ends else None
        answer = model.generate(ids, **options(ids, max_new_tokens=6, eos_token_id=last, pad_token_id=0))
        turns.append((ids, last, answer))
        ids = torch.cat((answer, random_ids(1, length, seed=length)), dim=1)
    recorder.on()
    cache = StaticCache(config=model.config, max_cache_len=64)
    for ids, last, answer in turns:
        choices = options(ids, max_new_tokens=6, eos_token_id=last, pad_token_id=0)
        assert torch.equal(model.generate(ids, past_key_values=cache, **choices), answer)
    assert ends or recorder.captures > 0


@pytest.mark.parametrize("name", ["deepseek_v3", "sandwich"])
def test_a_full_cache_of_the_callers_is_an_error(name, recorder):
    model, ids = tiny_model(name), random_ids(1, 9)
    recorder.on()
    cache = StaticCache(config=model.config, max_cache_len=12)
    with pytest.raises(ValueError, match="the static cache of 12 tokens is full"):
        model.generate(ids, past_key_values=cache, **options(ids))
    free = model.generate(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16), **options(ids))
    assert free.shape == (1, 17)
    # The last token ends the text, and is none that the cache must take.
    ends = options(ids, eos_token_id=int(free[0, 12]), pad_token_id=0)
    cache = StaticCache(config=model.config, max_cache_len=12)
    assert torch.equal(model.generate(ids, past_key_values=cache, **ends), free[:, :13])


def test_what_cannot_be_captured_runs_as_it_is(recorder):
    model, ids = tiny_model(next(iter(VARIANTS))).eval(), random_ids(1, 5)
    recorder.on()
    out = model.generate(
        ids, max_new_tokens=4, do_sample=False, cache_implementation="static", output_hidden_states=True,
        return_dict_in_generate=True, compile_config=None, disable_compile=True,
    )  # fmt: skip
    assert len(out.hidden_states) == 4
    assert recorder.captures == 0


@pytest.mark.parametrize("rope_type", ROPES)
def test_every_rope_over_the_length_it_was_trained_for(rope_type, recorder):
    """`dynamic` asks the host for the length, and `longrope` begins its cache anew at 64 tokens, which no graph can."""
    model = tiny_model("deepseek_v2", rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]})
    ids = random_ids(2, 60)
    expected = model.generate(ids, **options(ids))
    recorder.on()
    assert torch.equal(model.generate(ids, cache_implementation="static", **options(ids)), expected)
    assert recorder.captures == (rope_type not in ("dynamic", "longrope"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_a_cache_is_static_by_default_only_where_steps_are_replayed(implementation, monkeypatch):
    model = tiny_model("gqa")
    model.config._attn_implementation_internal = implementation
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert model._may_be_static(GenerationConfig(), GenerationMode.GREEDY_SEARCH) == (implementation == "sdpa")


@pytest.mark.parametrize(("free", "captures"), [(2**40, 1), (2**12, 0)])
def test_a_cache_is_static_by_default_only_where_it_has_room(free, captures, recorder, monkeypatch):
    model, ids = tiny_model("sandwich"), random_ids(2, 9)
    expected = model.generate(ids, **options(ids))
    recorder.on()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**40))
    assert torch.equal(model.generate(ids, **options(ids)), expected)
    assert recorder.captures == captures
