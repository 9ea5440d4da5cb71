"""What `hf-moe inspect` says of a text, by hand; on our model and on Transformers' own."""

import json
import os
import re
import sys

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.training.inspection import Choices, expert_choices

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "upcycling"))
from dense import save_dense


def olmoe():
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(
        vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=6, num_experts_per_tok=2,
    )).eval()  # fmt: skip


@pytest.mark.parametrize("model", [tiny_model("gqa"), olmoe()], ids=["hf_moe", "olmoe"])
def test_choices_are_the_routers(model):
    ids = random_ids(1, 9)
    choices = expert_choices(model, [str(token) for token in ids[0].tolist()], ids)
    with torch.no_grad():
        logits = torch.stack(model(ids, output_router_logits=True).router_logits)
    scores, index = logits.float().softmax(-1).topk(2)
    assert torch.equal(choices.index, index)
    torch.testing.assert_close(choices.weight, scores / scores.sum(-1, keepdim=True))
    assert choices.experts == logits.shape[-1]
    assert choices.load.counts.sum().item() == 2 * 9 * 2


def test_an_experts_favourites_are_what_it_gets_beyond_chance():
    index = torch.tensor([[[0, 1], [0, 1], [2, 3], [0, 2]]])
    choices = Choices(["a", "a", "b", "c"], index, torch.full((1, 4, 2), 0.5), 4)
    assert choices.favourites(0, 0) == ["a", "c"]
    assert choices.favourites(0, 3) == ["b"]


def test_the_command_shows_a_table_and_writes_a_page(tmp_path):
    save_dense(tmp_path / "dense", "llama3", tokenizer=True)
    model = olmoe()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = "Some words, and </script> among them."
    (tmp_path / "text.txt").write_text(text)
    words = ["inspect", tmp_path / "model", "--text", tmp_path / "text.txt", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "busiest over mean" in result.stdout
    page = (tmp_path / "out" / "experts.html").read_text()
    assert page.count("</script>") == 1
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert len(data["index"]) == 2
    assert len(data["tokens"]) == len(data["index"][1]) == len(tokenizer(text)["input_ids"])
    assert (tmp_path / "out" / "load.png").stat().st_size > 1000


def test_a_dense_model_is_refused_in_one_sentence(tmp_path):
    save_dense(tmp_path / "dense", "llama3", tokenizer=True)
    (tmp_path / "text.txt").write_text("words")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "dense"), "--text", str(tmp_path / "text.txt")])
    assert (result.exit_code, "has no experts" in result.stderr) == (1, True)
