"""Fine-tuning of the demonstration: LoRA on the attention through Transformers' Trainer."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from .arithmetic import IGNORE, ChatExamples

# On attention alone: enough to learn sums, in the minutes that a demo has on a CPU.
LORA = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "kv_a_proj_with_mqa", "o_proj"],
)


def finetune(
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[dict[str, str]],
    output: Path,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the adapter on each problem once and save it as `output`/adapter.

    Goes on from the last checkpoint in `output`/checkpoints where there is one.

    Returns:
        trainable and all parameters, steps, training tokens, and the loss curve as [[step, loss], …].
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(model, LORA)
    trainable, total = model.get_nb_trainable_parameters()
    examples = ChatExamples(problems, tokenizer)
    checkpoints = output / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=4,
        save_steps=25,
        save_total_limit=1,
        report_to="none",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_complete(checkpoints))
    model.save_pretrained(output / "adapter")
    return {
        "trainable_parameters": trainable,
        "parameters": total,
        "steps": trainer.state.global_step,
        "tokens": sum(len(row["input_ids"]) for row in examples.rows),
        "loss": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
    }


def last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end, which Trainer marks with its state."""
    complete = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
