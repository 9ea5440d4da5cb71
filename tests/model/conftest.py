"""What stands in for a GPU: the attention function "hf_moe_latent" in plain PyTorch, and graphs that run again."""

import pytest
import torch

from hf_moe.kernels import reference
from hf_moe.model import absorbed_hf_moe, generation_hf_moe


class LatentReference:
    """Counts its calls, and those for sequences in pages."""

    def __init__(self):
        self.calls = self.in_pages = 0

    def __call__(
        self, module, query, key, value, attention_mask, scaling, *, q_latent, w_uv, softcap=None, s_aux=None,
        is_causal=None, end=None, window=None, pages=None,
    ):  # fmt: skip
        self.calls += 1
        options = {"scaling": scaling, "softcap": softcap, "sinks_H": s_aux, "window": window, "value_HVC": w_uv}
        if pages is not None:
            self.in_pages += "slot_L" in pages
            pages = {name: given for name, given in pages.items() if not name.startswith("longest")}
            return reference.latent_decode_packed(q_latent, query, value, key, **options, **pages), None
        options |= {"attention_mask": attention_mask, "is_causal": is_causal, "end_B": end}
        return reference.latent_decode(q_latent, query, value, key, **options), None


@pytest.fixture
def latent_kernel(monkeypatch) -> LatentReference:
    """The kernel's calls, as on a GPU: where attention is not eager."""
    kernel = LatentReference()
    eager = ("eager", "paged|eager")
    choose = lambda module, query: None if module.config._attn_implementation in eager else kernel  # noqa: E731
    monkeypatch.setattr(absorbed_hf_moe, "latent_function", choose)
    return kernel


class Recorder:
    """Takes the place of a CUDA graph: its logits stand at one address and are overwritten by each replay."""

    def __init__(self, monkeypatch):
        self.captures = self.replays = 0
        self.on = lambda: monkeypatch.setattr(generation_hf_moe, "REPLAYING_DEVICES", ("cpu",))
        self.off = lambda: monkeypatch.setattr(generation_hf_moe, "REPLAYING_DEVICES", ())

    def __call__(self, call, device):
        self.captures += 1
        logits = torch.empty(0)

        def replay():
            self.replays += 1
            new = call()
            logits.resize_(new.shape).copy_(new)

        return replay, logits


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Captures steps on the CPU between `on` and `off`, with all the memory that may be wanted."""
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(generation_hf_moe, "capture_cuda_graph", recorder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    return recorder
