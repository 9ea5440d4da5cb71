"""What is measured of an export: the latents before it, and how far its logits are afterwards."""

from pathlib import Path
from typing import Any

from .mixture_source import MixtureSource


def measure_latent_norms(source: MixtureSource, progress: bool, tokens: int = 2048) -> list[float]:
    """Mean over a text's tokens of each layer's latent's root mean square, padded as `export` pads it.

    Times that, a normed latent has the least squared error.
    """
    import torch

    from .model_runs import load_target, quiet_loading, token_ids
    from .progress import step_bar

    ids, _ = token_ids(source, source.path, None, min(tokens, source.config["max_position_embeddings"]))
    with quiet_loading():
        model = load_target(source.path)
    ranks, means = model.config.latent_widths, dict[int, float]()
    with step_bar("measuring the latents", len(ranks), progress) as advance:
        for number, layer in enumerate(model.model.layers):

            def measure(module: Any, args: Any, output: torch.Tensor, number: int = number) -> None:
                latent = output[..., : ranks[number]].double()
                means[number] = (latent.square().sum(-1) / max(ranks)).sqrt().mean().item()
                advance(1)

            layer.self_attn.kv_a_proj_with_mqa.register_forward_hook(measure)
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
    return [means[number] for number in range(len(ranks))]


def measure_export(folder: str | Path, out: str | Path, *, tokens: int = 512, progress: bool = True) -> dict[str, Any]:
    """How far an exported model is from ours: both run in fp32, on Python's language reference or random tokens.

    Returns:
        tokens, text, max_abs_difference, mean_abs_difference and top1_agreement of the logits; greedy_tokens and
        whether they are equal.
    Cost: both models in fp32, one after the other.
    """
    import gc

    from transformers import AutoModelForCausalLM

    from .model_runs import fixed_length, load_target, quiet_loading, run, token_ids

    source, runs = MixtureSource(str(folder)), []
    ids, text = token_ids(source, source.path, None, min(tokens, source.config["max_position_embeddings"]))
    with quiet_loading():
        for name, load in (
            ("running the model", lambda: load_target(source.path)),
            ("running the export", lambda: AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()),
        ):
            runs.append(run(load(), ids, 16, fixed_length(source.config), name, progress))
            gc.collect()
    ours, theirs = runs
    difference = (theirs.logits - ours.logits).abs()
    return {
        "tokens": len(ours.logits),
        "text": text,
        "max_abs_difference": difference.max().item(),
        "mean_abs_difference": difference.mean().item(),
        "top1_agreement": (theirs.logits.argmax(-1) == ours.logits.argmax(-1)).double().mean().item(),
        "greedy_tokens": len(ours.greedy),
        "greedy_equal": ours.greedy == theirs.greedy,
    }
