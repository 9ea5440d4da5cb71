"""The report of the demonstration: a table, a loss curve and a heat map of expert load."""

import platform
import resource
from pathlib import Path
from typing import Any

import torch

from ..training.pictures import draw_load
from .progress import Progress


def draw_loss(curve: list[list[float]], path: Path) -> None:
    """Training loss over steps."""
    # A figure of its own and not pyplot's, which would ask for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in curve], [loss for _, loss in curve], color="tab:blue")
    axes.set(xlabel="step", ylabel="loss on answers", ylim=(0, None), title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def write_report(progress: Progress, output: Path) -> dict[str, Any]:
    """Draw both pictures and write report.md from the results of the steps before."""
    steps = {name: step["result"] for name, step in progress.state["steps"].items()}
    logits, decode = steps["verify"]["logits"], steps["verify"]["decode"]
    before, after = steps["before"], steps["after"]
    tuned, spoken = steps["finetune"], steps["generate"]
    draw_loss(tuned["loss"], output / "loss.png")
    draw_load(torch.tensor(after["expert_share"]), output / "expert_load.png", "load over the mean, held-out sums")

    size = steps["upcycle"]
    rows = [
        ("Parameters", f"{size['parameters'] / 1e6:.0f} M, {size['active_parameters'] / 1e6:.0f} M active a token"),
        ("Cache", f"{size['cache_numbers']} numbers a token and layer"),
        (f"max \\|Δlogit\\|, fp32, {logits['tokens']:,} tokens of text", f"{logits['max_abs_difference']:.1e}"),
        ("Top-1 agreement", f"{logits['top1_agreement']:.2%}"),
        (
            f"{decode['greedy_tokens']} greedy tokens equal to the dense model's",
            "yes" if decode["greedy_equal"] else "no",
        ),
        ("max \\|Δlogit\\|, cached against uncached decode", f"{decode['cached_max_abs_difference']:.1e}"),
        (f"Bare right number, {before['problems']} held-out sums, before fine-tuning", f"{before['accuracy']:.1%}"),
        (f"… after {tuned['steps']} steps, {tuned['tokens']:,} tokens", f"{after['accuracy']:.1%}"),
        ("Right number in any wording, before", f"{before['lenient']:.1%}"),
        ("… after", f"{after['lenient']:.1%}"),
        ("Trainable parameters", f"{tuned['trainable_parameters'] / 1e6:.2f} M"),
        ("Busiest expert over the mean, any layer", f"{after['max_over_mean_load']:.2f}"),
        ("Peak memory of the last run", f"{peak_memory() / 1e9:.1f} GB"),
    ]
    timing = [f"| {name} | {step['seconds']:.0f} |" for name, step in progress.state["steps"].items()]
    total = sum(step["seconds"] for step in progress.state["steps"].values())
    text = [
        f"# {Path(progress.state['settings']['model']).stem} as a mixture of experts",
        "",
        f"Made by `hf-moe demo` on {processor()} with {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {_version('transformers')}, "
        f"peft {_version('peft')}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## What it says before fine-tuning",
        "",
        f"> {spoken['prompt']}",
        "",
        spoken["reply"],
        "",
        "## Fine-tuning",
        "",
        "![Loss](loss.png)",
        "",
        "![Expert load by layer](expert_load.png)",
        "",
        "| question | answer | before | after |",
        "|---|---|---|---|",
        *(
            f"| {old['question']} | {old['answer']} | {_cell(old['reply'])} | {_cell(new['reply'])} |"
            for old, new in zip(before["examples"], after["examples"], strict=True)
        ),
        "",
        "| step | seconds |",
        "|---|---|",
        *timing,
        f"| all | {total:.0f} |",
        "",
    ]
    (output / "report.md").write_text("\n".join(text), encoding="utf-8")
    return {"seconds": total}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
