"""GGUF files as sources, by the names and in the order of rows that Transformers uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import family_of
from .headers import ITEM_SIZE, TensorHeader
from .sources import Source, torch_dtype

if TYPE_CHECKING:
    import torch


class GgufSource(Source):
    """A GGUF file: quantised tensors are dequantised one at a time, in float32.

    Names, and the order of query and key rows, are Transformers' own; `read` gives what
    `from_pretrained(gguf_file=...)` gives.
    """

    def __init__(self, location: str, path: Path):
        super().__init__(location, path)
        import gguf
        from transformers import AutoConfig

        with _gguf_errors(path):
            self._reader = gguf.GGUFReader(path)
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        self.config = config.to_dict()
        self.config.pop("_model_name_or_path", None)
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        if "rope_freqs.weight" in stored:
            raise ValueError(
                f"{path.name} carries rope frequency factors (rope_freqs.weight), which its configuration cannot "
                "express; convert the safetensors folder of this model"
            )
        self._stored = self._hf_names(stored)
        self.headers = {name: self._header(tensor) for name, tensor in self._stored.items()}

    def _hf_names(self, stored: dict[str, Any]) -> dict[str, Any]:
        import gguf

        family = family_of(self.config)
        architecture = family.gguf_architecture
        enum = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
        layers = self.config["num_hidden_layers"]
        names = gguf.get_tensor_name_map(enum, layers)
        table = {}
        for name in family.source_names(layers):
            stem, _, suffix = name.rpartition(".")
            gguf_name = f"{names.get_name(stem)}.{suffix}"
            if gguf_name in stored:
                table[name] = stored[gguf_name]
        if unknown := sorted(stored.keys() - {tensor.name for tensor in table.values()}):
            raise ValueError(f"{unknown[0]} is no tensor of {family.architecture}, and would be lost")
        return table

    def _header(self, tensor: Any) -> TensorHeader:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        dtype = {"F16": "F16", "BF16": "BF16"}.get(tensor.tensor_type.name, "F32")
        count = 1
        for n in shape:
            count *= n
        # The size is that of the dequantised tensor, which is what the plan needs to know.
        return TensorHeader(dtype, shape, self.path, 0, count * ITEM_SIZE[dtype])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Dequantises the whole tensor, then takes the rows."""
        import gguf
        import torch

        tensor = self._stored[name]
        dequantised = gguf.dequantize(tensor.data, tensor.tensor_type)
        data = torch.from_numpy(dequantised.copy()).to(torch_dtype(self.headers[name].dtype))
        family = family_of(self.config)
        if family.gguf_norm_offset and "norm" in tensor.name:
            data = data - family.gguf_norm_offset
        if family.gguf_permuted_heads:
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
            for part, field in heads.items():
                if f".{part}." in tensor.name:
                    data = _unpermute(data, self.config[field])
        return data[start:stop]

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    def load_arguments(self) -> dict[str, Any]:
        """The folder and the file."""
        return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}

    def has_tokenizer(self) -> bool:
        """Whether the file holds a vocabulary."""
        return self._reader.get_field("tokenizer.ggml.tokens") is not None

    def license(self) -> str | None:
        """`general.license` of the file."""
        field = self._reader.get_field("general.license")
        return None if field is None else str(field.contents())


def _unpermute(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows from llama.cpp's order (pairs 0,1 rotate together) to Transformers' (i, i + P/2)."""
    width = weight.shape[0] // heads
    return weight.unflatten(0, (heads, width // 2, 2)).transpose(1, 2).reshape(weight.shape).contiguous()


@contextmanager
def _gguf_errors(path: Path) -> Iterator[None]:
    # gguf's reader maps the file and answers damage with whatever NumPy raised.
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, OSError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{path.name} is not a GGUF file that can be read: {error}") from error
