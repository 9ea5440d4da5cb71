"""Supervised fine-tuning of a mixture on dialogues with TRL's SFTTrainer.

    pip install trl datasets
    python examples/finetune_trl.py --tiny                                      # seconds on a CPU, a random model
    python examples/finetune_trl.py moe-model --dialogues chat.jsonl --output runs/chat

A line of the file is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}. TRL
computes the loss itself and knows Mixtral's auxiliary loss only, so the experts are balanced by the selection bias.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.training import SelectionBiasCallback, use_selection_bias

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}"


def tiny() -> tuple[Any, Any, list[dict]]:
    """A random mixture of bytes with a tokenizer, and sums as dialogues."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = HfMoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    sums = [(a, b) for a in range(8) for b in range(8)]
    return HfMoeForCausalLM(config), tokenizer, [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]}
        for a, b in sums
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="folder or Hub id of a mixture with a chat template")
    add("--tiny", action="store_true", help="a random model of bytes, for a look at what happens")
    add("--dialogues", type=Path, help="JSON lines")
    add("--output", type=Path, default=Path("runs/sft"))
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8)
    add("--learning-rate", type=float, default=2e-5)
    add("--bias-rate", type=float, default=1e-3)
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.learning_rate, options.bias_rate = 20, 1e-2, 0.03
        model, tokenizer, dialogues = tiny()
    elif options.model and options.dialogues:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        dialogues = [json.loads(line) for line in options.dialogues.read_text().splitlines() if line.strip()]
    else:
        parser.error("name a model and --dialogues, or say --tiny")

    use_selection_bias(model)
    model.config.router_aux_loss_coef = 0.0
    on_gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(dialogues),
        processing_class=tokenizer,
    )
    SelectionBiasCallback(rate=options.bias_rate, per_layer=False).add_to(trainer)
    trainer.train()
    trainer.save_model(options.output / "model")
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"loss {first['loss']:.3f} → {last['loss']:.3f}, busiest expert over mean {last['experts/max_over_mean']:.2f}"
    )


if __name__ == "__main__":
    main()
