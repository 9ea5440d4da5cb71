"""The task of the demonstration: sums from `reasoning-gym`, asked in the model's chat template, scored exactly."""

import re
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Two numbers of one or two digits: hard enough that the untuned model rarely gives the bare number, easy enough that
# a few hundred examples show.
DIFFICULTY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
HELD_OUT_SEED, TRAINING_SEED = 20_011, 1
IGNORE = -100


def problems(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """`count` different questions with their answers, none of them in `without`; the same for the same seed."""
    from reasoning_gym import create_dataset

    found: dict[str, str] = {}
    # The task has about 16,000 questions, so drawing four times as many as wanted always suffices here.
    for entry in create_dataset("chain_sum", size=4 * count, seed=seed, **DIFFICULTY):
        if entry["question"] not in without and len(found) < count:
            found.setdefault(entry["question"], entry["answer"])
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def held_out_problems(count: int) -> list[dict[str, str]]:
    """The questions that accuracy is measured on."""
    return problems(count, HELD_OUT_SEED)


def training_problems(count: int, held_out: list[dict[str, str]]) -> list[dict[str, str]]:
    """Questions to learn from, none of which is held out."""
    return problems(count, TRAINING_SEED, without=frozenset(problem["question"] for problem in held_out))


class ChatExamples(Dataset):
    """Question and answer as a dialogue; labels on the answer and the end of turn only."""

    def __init__(self, problems: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase):
        self.rows = [self.encode(problem, tokenizer) for problem in problems]

    @staticmethod
    def encode(problem: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """Token ids of the whole dialogue, and labels with IGNORE over the question."""
        question = [{"role": "user", "content": problem["question"]}]
        answer = [{"role": "assistant", "content": problem["answer"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(question + answer, return_dict=True)["input_ids"]
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                "the chat template writes a question differently once it has an answer; choose another model"
            )
        return {"input_ids": whole, "labels": [IGNORE] * len(prompt) + whole[len(prompt) :]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    batch_size: int = 50,
    description: str = "solving",
) -> dict[str, Any]:
    """Share of problems whose greedy reply is the number and nothing else.

    Args:
        tokenizer: pads on the left.
    Returns:
        accuracy; lenient, the share of replies whose last number is right, whatever stands around it; number of
        problems; and the first five questions with answer and reply.
    """
    replies: list[str] = []
    with tqdm(total=len(problems), desc=description, unit="problem") as bar:
        for begin in range(0, len(problems), batch_size):
            batch = problems[begin : begin + batch_size]
            inputs = tokenizer.apply_chat_template(
                [[{"role": "user", "content": problem["question"]}] for problem in batch],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(model.device)
            output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
            replies += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            bar.update(len(batch))
    last_numbers = [(re.findall(r"-?\d+", reply) or [""])[-1] for reply in replies]
    right = [reply.strip() == problem["answer"] for reply, problem in zip(replies, problems, strict=True)]
    return {
        "accuracy": sum(right) / len(right),
        "lenient": sum(number == problem["answer"] for number, problem in zip(last_numbers, problems, strict=True))
        / len(right),
        "problems": len(right),
        "examples": [
            {**problem, "reply": reply.strip()} for problem, reply in zip(problems[:5], replies[:5], strict=True)
        ],
    }
