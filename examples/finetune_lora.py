"""Fine-tune a mixture with LoRA on its experts: the weights stay frozen, the adapter is a file of its own.

    python examples/finetune_lora.py --tiny                                     # seconds on a CPU, a random model
    python examples/finetune_lora.py moe-model --text notes.txt --output runs/notes
    python examples/finetune_lora.py allenai/OLMoE-1B-7B-0924 --text notes.txt --preset all --rank 32

Any mixture that Transformers knows will do, not ours alone. OUTPUT/adapter is in peft's format, and plain peft loads
it; with --merge, OUTPUT/model is a whole model with the adapter summed into its weights.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForCausalLM, accelerate
from hf_moe.training.lora import PRESETS, load_lora, lora_config


def pieces(ids: list[int], length: int) -> list[dict[str, torch.Tensor]]:
    """A long text as sequences of one length; what is left over at its end is not used."""
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not len(rows):
        raise ValueError(f"the text has {len(ids)} tokens, fewer than the {length} of one sequence")
    return [{"input_ids": row, "labels": row} for row in rows]


def tiny() -> tuple[Any, list[int]]:
    """A random mixture of bytes, and this file to learn from."""
    torch.manual_seed(0)
    config = HfMoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0, max_position_embeddings=128,
        initializer_range=0.3,
    )  # fmt: skip
    return HfMoeForCausalLM(config), list(Path(__file__).read_bytes())


def load(options: argparse.Namespace) -> tuple[Any, list[int]]:
    """The frozen model, in half precision on a GPU, on our kernels; and the text."""
    if options.tiny:
        model, ids = tiny()
    else:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
    return accelerate(model), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="folder or Hub id of a mixture")
    add("--tiny", action="store_true", help="a random model of bytes, for a look at what happens")
    add("--text", type=Path, help="text file to learn from")
    add("--output", type=Path, default=Path("runs/lora"))
    add("--preset", choices=PRESETS, default="experts", help="what gets adapters")
    add("--rank", type=int, default=16)
    add("--dropout", type=float, default=0.0)
    add("--length", type=int, default=512)
    add("--batch", type=int, default=8)
    add("--steps", type=int, default=200)
    add("--learning-rate", type=float, default=2e-4)
    add("--checkpointing", action="store_true", help="compute each layer again in the backward: less memory")
    add("--merge", action="store_true", help="also save the model with the adapter in its weights")
    options = parser.parse_args()
    if options.tiny:
        options.length, options.batch, options.steps, options.learning_rate, options.rank = 32, 4, 20, 5e-2, 8
    elif not (options.model and options.text):
        parser.error("name a model and --text, or say --tiny")

    model, ids = load(options)
    # Routers are frozen in every preset, so there is nothing to balance.
    model.config.output_router_logits = False
    model.config.router_aux_loss_coef = 0.0
    config = lora_config(
        options.preset,
        model=model,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.print_trainable_parameters()
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        adapted,
        TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=max(1, options.steps // 20),
            gradient_checkpointing=options.checkpointing,
            save_strategy="no",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            report_to="none",
        ),
        train_dataset=pieces(ids, options.length),
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {first['loss']:.3f} → {last['loss']:.3f}, adapter in {options.output / 'adapter'}")
    adapted.save_pretrained(options.output / "adapter")
    if options.merge:
        # As a later program would: the base again, and the adapter from its file.
        base, _ = load(options)
        load_lora(base, options.output / "adapter").merge_and_unload().save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
