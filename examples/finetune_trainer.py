"""Fine-tune all weights of a mixture with Trainer: experts balanced by the selection bias, matrices trained by Muon.

    python examples/finetune_trainer.py --tiny                                  # seconds on a CPU, a random model
    python examples/finetune_trainer.py moe-model --text notes.txt --output runs/notes

Losses and the load of the experts go to the terminal and, where it is installed, to TensorBoard; heat maps of the load
to OUTPUT/experts.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.training import MuonAdamW, SelectionBiasCallback, use_selection_bias


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
    )  # fmt: skip
    return HfMoeForCausalLM(config), list(Path(__file__).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="folder or Hub id of a mixture, as `hf-moe upcycle` makes it")
    add("--tiny", action="store_true", help="a random model of bytes, for a look at what happens")
    add("--text", type=Path, help="text file to learn from")
    add("--output", type=Path, default=Path("runs/finetune"))
    add("--length", type=int, default=512)
    add("--batch", type=int, default=8)
    add("--steps", type=int, default=200)
    add("--learning-rate", type=float, default=2e-4)
    add("--bias-rate", type=float, default=1e-3)
    options = parser.parse_args()
    if options.tiny:
        options.length, options.batch, options.steps, options.learning_rate, options.bias_rate = 32, 4, 20, 1e-2, 0.03
        model, ids = tiny()
    elif options.model and options.text:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
    else:
        parser.error("name a model and --text, or say --tiny")

    # The bias balances, so the auxiliary loss need not.
    use_selection_bias(model)
    model.config.router_aux_loss_coef = 0.0
    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        ),
        train_dataset=pieces(ids, options.length),
        optimizer_cls_and_kwargs=(
            MuonAdamW.for_trainer,
            {"lr": options.learning_rate, "weight_decay": 0.01, "router": {"lr": options.learning_rate / 2}},
        ),
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
