"""A dense model run layer by layer: Transformers' own code, with the weights of one layer in memory.

Letters: B sequences, S tokens of one, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .sources import Source


@dataclass(frozen=True)
class Passage:
    """What one layer saw of the text: its module, filled; its input and output (B, S, D); the other arguments of its
    `forward`, with the masks and rotations of one sequence, which are those of all; the input and output of its
    attention, and the input of its MLP."""

    number: int
    module: Any
    hidden: torch.Tensor
    output: torch.Tensor
    arguments: dict[str, Any]
    attention_input: torch.Tensor
    attention_output: torch.Tensor
    mlp_input: torch.Tensor

    def again(self, hidden: torch.Tensor, attention: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
        """The layer's output for another input, with another function in place of its attention, where given."""
        own = self.module.self_attn
        if attention is not None:
            self.module.self_attn = _Replaced(attention)
        try:
            output = self.module.forward(hidden, **self.arguments)
            return output[0] if isinstance(output, tuple) else output
        finally:
            self.module.self_attn = own


class _Replaced(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.function(hidden_states), None


def _of_one(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_of_one, value))
    return value[:1] if isinstance(value, torch.Tensor) and value.dim() > 1 else value


class DenseLayers:
    """Transformers' model of a source, in fp32, empty but for what is being run."""

    def __init__(self, source: Source, device: torch.device | None = None):
        import transformers
        from accelerate import init_empty_weights

        self.source, self.device = source, device or torch.device("cpu")
        self._head: torch.Tensor | None = None
        plain = {key: value for key, value in source.config.items() if key not in ("quantization_config", "dtype")}
        config = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
        with init_empty_weights(include_buffers=False):
            self.model: Any = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
        self.model.rotary_emb.to(self.device)
        for name in ("embed_tokens", "norm"):
            self.fill(getattr(self.model, name), f"model.{name}.")

    def fill(self, module: Any, prefix: str) -> None:
        """Give a module its weights."""
        names = [name for name, _ in module.named_parameters()]
        state = {name: self.read(f"{prefix}{name}") for name in names}
        module.load_state_dict(state, strict=False, assign=True)
        # Gemma's embedding scale is a buffer.
        module.to(self.device)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the source in fp32."""
        return self.source.read(name).float().to(self.device)

    @torch.no_grad()
    def run(self, ids: torch.Tensor, visit: Callable[[Passage], None], advance: Callable[[int], None]) -> None:
        """Run the whole text (B, S) through all layers; `visit` is called while a layer's weights are there.

        Cost: 2 FLOPs for each weight and token; memory of one layer, and of its activations for all tokens.
        """

        def visited(passage: Passage) -> None:
            visit(passage)
            advance(1)

        hooks = [hook for number, layer in enumerate(self.model.layers) for hook in self._watch(layer, number, visited)]
        try:
            self.model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, layer: Any, number: int, visit: Callable[[Passage], None]) -> list[Any]:
        seen: dict[str, Any] = {}

        def before(module: Any, positional: Any, named: dict[str, Any]) -> None:
            self.fill(module, f"model.layers.{number}.")
            seen["hidden"] = positional[0] if positional else named["hidden_states"]
            seen["arguments"] = {key: _of_one(value) for key, value in named.items() if key != "hidden_states"}

        def attention(module: Any, positional: Any, named: dict[str, Any], output: Any) -> None:
            seen["attention_input"] = positional[0] if positional else named["hidden_states"]
            seen["attention_output"] = output[0]

        def mlp(module: Any, positional: Any) -> None:
            # `again` runs the layer once more.
            seen.setdefault("mlp_input", positional[0])

        def after(module: Any, positional: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            visit(Passage(number=number, module=module, output=output, **seen))
            seen.clear()
            module.to("meta")

        return [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.self_attn.register_forward_hook(attention, with_kwargs=True),
            layer.mlp.register_forward_pre_hook(mlp),
            layer.register_forward_hook(after),
        ]

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token, (…, V), from the last layer's output."""
        config = self.source.config
        if self._head is None:
            tied = config.get("tie_word_embeddings") or "lm_head.weight" not in self.source.headers
            self._head = self.model.embed_tokens.weight if tied else self.read("lm_head.weight")
        logits = self.model.norm(hidden) @ self._head.T / (config.get("logits_scaling") or 1.0)
        if cap := config.get("final_logit_softcapping"):
            logits = torch.tanh(logits / cap) * cap
        return logits.log_softmax(-1)
