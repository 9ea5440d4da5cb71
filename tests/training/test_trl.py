"""TRL's SFTTrainer: a step is the same with one batch of eight and with eight of one."""

import pytest
import torch
from tiny import random_ids, tiny_model

pytest.importorskip("trl", reason="needs trl and datasets")

from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_moe.training import SelectionBiasCallback, use_selection_bias
from hf_moe.training.balance import selection_biases

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def step(folder, model, ids, batch, callbacks=()):
    """The reported loss and the weights after one step on eight sequences."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>")),
        eos_token="<end>",
        pad_token="<end>",
    )
    arguments = SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, use_cpu=True,
        save_strategy="no", report_to="none", bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()])
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks))
    trainer.train()
    return trainer.state.log_history[0]["loss"], model.state_dict()


@pytest.mark.parametrize("kind", ["auxiliary loss", "selection bias"])
def test_accumulation_changes_nothing(tmp_path, kind):
    results = []
    for batch in (8, 1):
        if kind == "selection bias":
            # Sequences of their own: the bias sees all of them.
            ids = random_ids(8, 10)
            model = use_selection_bias(tiny_model("gqa", router_aux_loss_coef=0.0))
            callbacks = [SelectionBiasCallback(rate=0.25, pictures=False)]
        else:
            # One sequence eight times: the load of each micro-batch is that of the whole, so the losses must agree.
            ids = random_ids(1, 10).expand(8, -1)
            model, callbacks = tiny_model("gqa", router_aux_loss_coef=2.0), []
        results.append(step(tmp_path, model, ids, batch, callbacks))
        if callbacks:
            assert torch.stack(selection_biases(model)).abs().max() == 0.25
    (loss, whole), (found, split) = results
    assert found == pytest.approx(loss, rel=1e-4)
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-4, atol=1e-5, msg=name)
