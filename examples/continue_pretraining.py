"""Continue pre-training: a dense model against the mixtures made of it, on the same tokens in the same order.

    python examples/continue_pretraining.py --tiny                     # seconds on a CPU: a random model, random ids
    python examples/continued/prepare_text.py .data                    # once: real text, from Debian's manuals
    python examples/continue_pretraining.py --text .data --compile     # SmolLM2-135M, 20 M tokens, one GPU

Writes results.json, curves.json and curves.png into --output, and the table of a README.md there, a run at a time; runs
of an earlier call with the same setup stay, so `--inits split drop` adds or replaces these two. Training is bfloat16
autocast over float32 weights; experts are balanced by the selection bias alone.
"""

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_moe.demo.run import packaged_checkpoint
from hf_moe.training import SelectionBiasCallback, measure_expert_load, use_selection_bias
from hf_moe.upcycling import open_source, upcycle

MIXTURES: dict[str, dict[str, Any]] = {
    "copy": {"mode": "copy", "experts": 4, "top_k": 2},
    "split": {"mode": "split", "shards": 4, "shared_shards": 1, "experts": 12, "top_k": 6},
    "drop": {"mode": "drop", "experts": 4, "top_k": 2, "drop_ratio": 0.5},
}
RUNS = {
    "dense": "as it is",
    "copy": "4 experts, top-2",
    "split": "a shared quarter and 6 of 12 routed ones, two of each other quarter",
    "drop": "4 experts with half their neurons redrawn, top-2",
}


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Consecutive pieces of one long row of token ids."""

    def __init__(self, ids: np.ndarray, length: int):
        self.rows = torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length).astype(np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Echo(TrainerCallback):
    """A line early on, when what compiles has compiled, says how long a run will take; then one an evaluation."""

    def __init__(self, tokens_a_step: int):
        self.tokens_a_step, self.step, self.time, self.promised = tokens_a_step, 0, time.monotonic(), False

    def speed(self, step: int) -> float:
        """Tokens a second since the last call."""
        now = time.monotonic()
        speed = (step - self.step) * self.tokens_a_step / (now - self.time)
        self.step, self.time = step, now
        return speed

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Its numbers were read from the device: all steps before it are done.
        if not self.promised and state.global_step:
            first, speed = self.step == 0, self.speed(state.global_step)
            if not first:
                self.promised = True
                rest = (state.max_steps - state.global_step) * self.tokens_a_step / speed
                print(f"  step {state.global_step}: {speed:,.0f} tokens/s, {rest:.0f} s of training left", flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        speed = self.speed(state.global_step)
        print(f"  step {state.global_step}: held-out {metrics['eval_loss']:.4f}, {speed:,.0f} tokens/s", flush=True)


def unpack(path: Path) -> np.ndarray:
    """The array in an xz'd .npy file."""
    with lzma.open(path) as file:
        return np.load(file)


def load(source: Path, init: str, folder: Path) -> Any:
    """The dense model, or a mixture upcycled from it; float32, on the GPU where there is one."""
    if init == "dense":
        packed = AutoModelForCausalLM.from_pretrained(**open_source(source).load_arguments(), dtype=torch.float32)
        # Trainer takes a model read from a GGUF file for a quantised one.
        packed.config.__dict__.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
    else:
        if not (folder / init).exists():
            folder.mkdir(parents=True, exist_ok=True)
            upcycle(source, folder / init, **MIXTURES[init])
        model = AutoModelForCausalLM.from_pretrained(folder / init, dtype=torch.float32)
        use_selection_bias(model)
        model.config.router_aux_loss_coef = 0.0
    model.config.use_cache = False
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def compile_parts(model: Any) -> None:
    """Compile one decoder layer, which serves them all, and the loss: seconds instead of minutes."""
    torch.compiler.reset()
    # The residual stream in half precision, like the products that feed it.
    for module in (model.get_input_embeddings(), *(layer.mlp for layer in model.model.layers)):
        module.register_forward_hook(in_half)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)


def in_half(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook; one function for all layers, so that they share a graph."""
    return output.bfloat16()


def parameters(model: Any) -> tuple[int, int]:
    """All parameters, and those that one token meets."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts if routed else 0
    return total, total - round(routed * idle)


def train(model: Any, init: str, text: dict[str, Tokens], options: argparse.Namespace) -> tuple[dict, list]:
    """One run: its row of the table, and its curve as [[tokens, held-out loss], …]."""
    if options.compile:
        compile_parts(model)
    per_step = options.batch * options.length
    arguments = TrainingArguments(
        output_dir=str(options.output / "runs" / init),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        train_sampling_strategy="sequential",
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, options.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=options.compile or torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        prediction_loss_only=True,
        save_strategy="no",
        logging_steps=max(1, options.eval_steps // 4),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    callbacks: list[TrainerCallback] = [Echo(per_step)]
    if init != "dense":
        callbacks.append(SelectionBiasCallback(rate=options.bias_rate))
    trainer = Trainer(model, arguments, train_dataset=text["train"], eval_dataset=text["heldout"], callbacks=callbacks)
    curve = [[0, trainer.evaluate()["eval_loss"]]]
    trainer.train()
    curve += [[e["step"] * per_step, e["eval_loss"]] for e in trainer.state.log_history if "eval_loss" in e]
    balance = None
    if init != "dense":
        # A compiled layer would not see the hooks that count.
        with torch.compiler.set_stance("force_eager"), measure_expert_load(model) as experts:
            trainer.evaluate()
        balance = round(experts.max_over_mean, 4)
    row = {"tokens": curve[-1][0], "heldout_loss": round(curve[-1][1], 4), "max_over_mean_load": balance}
    return {"model": options.name, "init": init, **row}, curve


class Report:
    """The table, the curves and their picture in a folder, written anew with every run."""

    def __init__(self, options: argparse.Namespace, heldout_tokens: int):
        self.folder = options.output
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("steps", "batch", "length", "learning_rate", "bias_rate", "seed")
        self.setup = {name: getattr(options, name) for name in names} | {"heldout_tokens": heldout_tokens}
        self.rows: dict[str, dict] = {}
        self.curves: dict[str, list] = {}
        self.runs: dict[str, dict] = {}
        if (self.folder / "curves.json").exists():
            earlier = json.loads((self.folder / "curves.json").read_text())
            if earlier["setup"] == self.setup:
                rows = json.loads((self.folder / "results.json").read_text())
                # A mixture of other numbers is another one.
                kept = [init for init, run in earlier["runs"].items() if run["mixture"] == MIXTURES.get(init)]
                self.curves, self.runs = ({init: earlier[name][init] for init in kept} for name in ("curves", "runs"))
                self.rows = {row["init"]: row for row in rows if row["init"] in kept}

    def add(self, row: dict, curve: list, sizes: tuple[int, int], seconds: float) -> None:
        init = row["init"]
        self.rows[init], self.curves[init] = row, curve
        self.runs[init] = {
            "mixture": MIXTURES.get(init),
            "parameters": sizes[0],
            "active_parameters": sizes[1],
            "seconds": round(seconds),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self.write()

    def write(self) -> None:
        order = [init for init in RUNS if init in self.rows]
        (self.folder / "results.json").write_text(json.dumps([self.rows[init] for init in order], indent=1) + "\n")
        curves = {init: self.curves[init] for init in order}
        runs = {init: self.runs[init] for init in order}
        (self.folder / "curves.json").write_text(
            json.dumps({"setup": self.setup, "runs": runs, "curves": curves}, indent=1) + "\n"
        )
        draw(curves, self.folder / "curves.png")
        readme = self.folder / "README.md"
        if readme.exists():
            before, _, rest = readme.read_text().partition("| model |")
            after = rest.partition("\n\n")[2]
            readme.write_text(f"{before}{self.table(order)}\n\n{after}")

    def table(self, order: list[str]) -> str:
        """The runs as a table of Markdown; the lowest loss stands out."""
        best = min(row["heldout_loss"] for row in self.rows.values())
        lines = [
            "| model | parameters, active for a token | held-out loss at 0 | at the end | busiest expert over mean, "
            "worst layer |",
            "|---|---|---|---|---|",
        ]
        for init in order:
            row, run = self.rows[init], self.runs[init]
            total, active = (f"{run[key] / 1e6:.0f} M" for key in ("parameters", "active_parameters"))
            loss = f"{row['heldout_loss']:.4f}"
            load = f"{row['max_over_mean_load']:.2f}" if init != "dense" else ""
            lines.append(
                f"| {init}: {RUNS[init]} | {total}, {active} | {self.curves[init][0][1]:.4f} | "
                f"{f'**{loss}**' if row['heldout_loss'] == best else loss} | {load} |"
            )
        return "\n".join(lines)


def draw(curves: dict[str, list], path: Path) -> None:
    """Held-out loss against tokens; every mixture's distance from the dense model beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense = curves.get("dense")
    for init, curve in curves.items():
        millions, losses = [tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve]
        (line,) = left.plot(millions, losses, marker=".", label=f"{init}: {RUNS[init]}")
        if dense and init != "dense":
            right.plot(millions, [a - b for a, (_, b) in zip(losses, dense, strict=True)], ".-", color=line.get_color())
    left.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    right.set(xlabel="million tokens", ylabel="mixture minus dense")
    if dense:
        # The redrawn neurons begin far above the others.
        left.set_ylim(top=dense[0][1] * 1.1)
        right.set_ylim(-0.1, 0.1)
        right.axhline(0.0, color="grey", linewidth=0.8)
    left.legend()
    figure.savefig(path, dpi=120)


def tiny(options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Tokens]]:
    """A random Llama and random ids, for a run of seconds."""
    options.steps, options.batch, options.length, options.eval_steps, options.name = 4, 2, 16, 2, "tiny"
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    ids = np.random.default_rng(options.seed).integers(1, 64, 400).astype(np.uint16)
    return folder / "source", {"train": Tokens(ids[:320], 16), "heldout": Tokens(ids[320:384], 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="seconds on a CPU, with a random model")
    add("--text", type=Path, default=Path(".data"), help="folder with train.npy.xz and heldout.npy.xz")
    add("--source", type=Path, help="dense model; the packaged SmolLM2-135M-Instruct by default")
    add("--name", default="SmolLM2-135M", help="what the table calls it")
    add("--output", type=Path, help="examples/continued by default; with --tiny a temporary folder")
    add("--models", type=Path, help="where the mixtures are kept between runs; a temporary folder by default")
    add("--inits", nargs="+", default=list(RUNS), choices=list(RUNS))
    add("--steps", type=int, default=612)
    add("--batch", type=int, default=64)
    add("--length", type=int, default=512)
    add("--eval-steps", type=int, default=102)
    add("--heldout", type=int, default=640, help="held-out sequences")
    add("--learning-rate", type=float, default=6e-4)
    add("--bias-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="compile the layers: for a GPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.tiny:
            options.output = options.output or folder / "output"
            source, text = tiny(options, folder)
        else:
            options.output = options.output or Path(__file__).with_name("continued")
            source = options.source or packaged_checkpoint()
            text = {
                name: Tokens(unpack(options.text / f"{name}.npy.xz"), options.length) for name in ("train", "heldout")
            }
            text["heldout"].rows = text["heldout"].rows[: options.heldout]
        report = Report(options, text["heldout"].rows.numel())
        for init in options.inits:
            print(f"{init}: {RUNS[init]}", flush=True)
            torch.manual_seed(options.seed)
            start = time.monotonic()
            model = load(source, init, options.models or folder)
            print(f"  loaded after {time.monotonic() - start:.0f} s", flush=True)
            row, curve = train(model, init, text, options)
            seconds = time.monotonic() - start
            print(f"  {row}, {seconds:.0f} s in all", flush=True)
            report.add(row, curve, parameters(model), seconds)
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
