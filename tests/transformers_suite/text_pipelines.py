"""Stands in for `tests/pipelines`, which the source distribution lacks: each pipeline against the model itself."""

import torch
from transformers import pipeline

TEXTS = ["the cat sat on the mat", "a dog ran", "on the mat sat the cat"]
TESTS = {
    "feature-extraction": "text_pipelines.FeatureExtraction",
    "text-classification": "text_pipelines.TextClassification",
    "text-generation": "text_pipelines.TextGeneration",
    "token-classification": "text_pipelines.TokenClassification",
    "zero-shot": "text_pipelines.ZeroShot",
}


class _TextPipeline:
    task: str
    options: dict = {}

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        model = model.to(getattr(torch, dtype))
        return pipeline(self.task, model=model, tokenizer=tokenizer, **self.options), TEXTS

    @staticmethod
    @torch.no_grad()
    def outputs(pipe, text):
        return pipe.model(**pipe.tokenizer(text, return_tensors="pt"))


class FeatureExtraction(_TextPipeline):
    task = "feature-extraction"

    def run_pipeline_test(self, pipe, examples):
        for text, features in zip(examples, pipe(examples), strict=True):
            expected = self.outputs(pipe, text).last_hidden_state
            torch.testing.assert_close(torch.tensor(features, dtype=expected.dtype), expected)


class TextClassification(_TextPipeline):
    task = "text-classification"

    def run_pipeline_test(self, pipe, examples):
        for text, scores in zip(examples, pipe(examples, top_k=None), strict=True):
            expected = self.outputs(pipe, text).logits[0].float().softmax(-1)
            for score in scores:
                label = pipe.model.config.label2id[score["label"]]
                assert abs(score["score"] - expected[label].item()) < 1e-4


class TokenClassification(_TextPipeline):
    task = "token-classification"

    def run_pipeline_test(self, pipe, examples):
        for text, entities in zip(examples, pipe(examples, ignore_labels=[]), strict=True):
            expected = self.outputs(pipe, text).logits[0].float().softmax(-1)
            assert len(entities) == len(text.split())
            for entity in entities:
                assert abs(entity["score"] - expected[entity["index"]].max().item()) < 1e-4


class TextGeneration(_TextPipeline):
    task = "text-generation"
    options = {"max_new_tokens": 5, "do_sample": False}

    def run_pipeline_test(self, pipe, examples):
        for text, (answer,) in zip(examples, pipe(examples), strict=True):
            inputs = pipe.tokenizer(text, return_tensors="pt")
            expected = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False)
            assert answer["generated_text"].startswith(text)
            continuation = pipe.tokenizer.decode(expected[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            assert answer["generated_text"].removeprefix(text).split() == continuation.split()


class ZeroShot(_TextPipeline):
    task = "zero-shot-classification"
    options = {"candidate_labels": ["cat", "dog"], "hypothesis_template": "the {}"}

    def run_pipeline_test(self, pipe, examples):
        for answer in pipe(examples):
            assert sorted(answer["labels"]) == ["cat", "dog"]
            assert abs(sum(answer["scores"]) - 1) < 1e-3
