"""A dense model run layer by layer: Transformers' own code, with the weights of one layer in memory.

Letters: B sequences, S tokens of one, D hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .sources import Source
from .stream import check_finite


@dataclass(frozen=True)
class Passage:
    """One layer and what it reads of the text.

    Attributes:
        module: the layer, filled.
        hidden: its input, one tensor (1, S, D) for each sequence.
        arguments: the others of its `forward`: masks and rotations of one sequence, which are those of all.
    """

    number: int
    module: Any
    hidden: list[torch.Tensor]
    arguments: dict[str, Any]

    def output(
        self, hidden: torch.Tensor, attention: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The layer's output for an input (1, S, D), with another function in place of its attention, where given."""
        if attention is None:
            return self._forward(hidden)
        with _replaced(self.module, self_attn=_Attention(attention)):
            return self._forward(hidden)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the attention reads of an input; neither it nor the MLP is run."""
        seen: list[torch.Tensor] = []

        def attention(x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

        with _replaced(self.module, self_attn=_Attention(attention), mlp=torch.nn.Identity()):
            self._forward(hidden)
        return seen[0]

    def attention_output(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's own attention of what it reads."""
        return _first(self.module.self_attn(hidden_states=x, **self.arguments))

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the MLP reads of an input; it is not run."""
        # It hands on what it reads, which a hook sees.
        idle, seen = torch.nn.Identity(), list[torch.Tensor]()
        idle.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with _replaced(self.module, mlp=idle):
            self._forward(hidden)
        return seen[0]

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _first(self.module(hidden, **self.arguments))


class _Attention(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.function(hidden_states), None


@contextmanager
def _replaced(module: Any, **others: torch.nn.Module) -> Iterator[None]:
    own = {name: getattr(module, name) for name in others}
    for name, other in others.items():
        setattr(module, name, other)
    try:
        yield
    finally:
        for name, each in own.items():
            setattr(module, name, each)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


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
        self.fill(self.model.norm, "model.norm.")

    def fill(self, module: Any, prefix: str) -> None:
        """Give a module its weights."""
        names = [name for name, _ in module.named_parameters()]
        state = {name: self.read(f"{prefix}{name}") for name in names}
        module.load_state_dict(state, strict=False, assign=True)
        # Gemma's embedding scale is a buffer.
        module.to(self.device)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the source in fp32.

        Raises:
            ValueError: NaN or infinity, from which nothing can be learnt.
        """
        weight = self.source.read(name)
        check_finite(name, weight)
        return weight.float().to(self.device)

    @torch.no_grad()
    def run(
        self, ids: torch.Tensor, visit: Callable[[Passage], None], advance: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """Run the whole text (B, S) through all layers; `visit` is called while a layer's weights are there.

        Returns:
            The last layer's output, one tensor (1, S, D) for each sequence.
        Cost: 2 FLOPs for each weight and token; memory of one layer, of its activations for one sequence, and of a
            hidden state (D numbers in fp32) for each token.
        """
        hidden, arguments = self._embedded(ids)
        for number, layer in enumerate(self.model.layers):
            self.fill(layer, f"model.layers.{number}.")
            passage = Passage(number, layer, hidden, arguments[number])
            visit(passage)
            # Row by row in place: a second copy of all states would be the largest thing here.
            for b, row in enumerate(hidden):
                hidden[b] = passage.output(row)
            layer.to("meta")
            advance(1)
        return hidden

    def _embedded(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        """The first layer's input for each sequence, and every layer's other arguments: the model with idle layers."""
        hidden: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = [{} for _ in self.model.layers]

        def idle(number: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
                if number == 0:
                    hidden.append(hidden_states)
                arguments[number] = named
                return hidden_states

            return forward

        self.fill(self.model.embed_tokens, "model.embed_tokens.")
        for number, layer in enumerate(self.model.layers):
            layer.forward = idle(number)
        try:
            for row in ids.split(1):
                self.model(input_ids=row.to(self.device), use_cache=False)
        finally:
            for layer in self.model.layers:
                del layer.forward
        self.model.embed_tokens.to("meta")
        return hidden, arguments

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token, (…, V), from the last layer's output."""
        config = self.source.config
        if self._head is None:
            tied = config.get("tie_word_embeddings") or "lm_head.weight" not in self.source.headers
            self._head = self.read("model.embed_tokens.weight" if tied else "lm_head.weight")
        logits = self.model.norm(hidden) @ self._head.T / (config.get("logits_scaling") or 1.0)
        if cap := config.get("final_logit_softcapping"):
            logits = torch.tanh(logits / cap) * cap
        return logits.log_softmax(-1)
