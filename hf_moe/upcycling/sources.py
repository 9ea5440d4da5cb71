"""Where weights come from: a folder of safetensors, a GGUF file, a repository of the Hub.

All look alike: a configuration, headers by the names that Transformers uses, and `read`.
"""

import json
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .headers import ITEM_SIZE, TensorHeader, read_folder
from .quantised import dequantise, presented, scale_names

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# What a tokenizer, a processor or `generate` reads; everything else of the source stays behind.
COPIED_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)


class Source(ABC):
    """A dense checkpoint, opened but not read.

    Attributes:
        location: what the user named; goes into the card and the certificate.
        path: the folder or the file on this machine.
        revision: commit of the Hub, when it came from there.
        config: the model's configuration, every default filled in.
        headers: tensor name → dtype, shape, size.
    """

    def __init__(self, location: str, path: Path, revision: str | None = None):
        self.location = location
        self.path = path
        self.revision = revision
        self.config: dict[str, Any] = {}
        self.headers: Mapping[str, TensorHeader] = {}

    @property
    def title(self) -> str:
        """The name for card and certificate: a Hub id as it is, of a path the last part only."""
        return self.location if self.revision else self.path.resolve().name

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Rows `start` to `stop` of a tensor, all of them by default, in the dtype of its header.

        Raises:
            ValueError: the file ends early.
        """

    @abstractmethod
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments with which `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load this source."""

    @abstractmethod
    def license(self) -> str | None:
        """SPDX-like name of the licence that the source states."""

    @property
    def branches(self) -> "list[Source]":
        """The sources that this one stands for; several in mode `branch`."""
        return [self]

    def vocabulary(self) -> dict[str, int] | None:
        """Token → id, where the source says."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            return None
        model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
        return model.get("vocab")

    @property
    def quantised(self) -> bool:
        """Whether Transformers would not load these weights as plain numbers without help."""
        return False

    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({header.file for header in self.headers.values()})

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of every weight file: a resumed run must find the same."""
        stats = [(path, path.stat()) for path in self.files()]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


class FolderSource(Source):
    """A folder as `save_pretrained` writes it, one file or many."""

    def __init__(self, location: str, path: Path, revision: str | None = None):
        super().__init__(location, path, revision)
        config_path = path / "config.json"
        if not config_path.is_file():
            raise ValueError(f"{path} holds no config.json, so its architecture is unknown")
        try:
            raw = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config_path} is not JSON: {error}") from error
        self.config = _complete(raw)
        self._stored = read_folder(path)
        self._scales = scale_names(raw, self._stored)
        block = (raw.get("quantization_config") or {}).get("weight_block_size")
        self._block = (block[0], block[1]) if block else None
        self.headers = presented(self._stored, self._scales)

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in 8 bits and read in float32."""
        return bool(self._scales)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Reads the asked rows only; dequantises them where need be."""
        if name not in self._scales:
            return self._read_stored(name, start, stop)
        scale = self._read_stored(self._scales[name], 0, None)
        rows = self.headers[name].shape[0]
        return dequantise(self._read_stored(name, start, stop), scale, start, rows, self._block)

    def _read_stored(self, name: str, start: int, stop: int | None) -> "torch.Tensor":
        import torch

        header = self._stored[name]
        shape = list(header.shape)
        begin, end = header.start, header.stop
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            row = header.nbytes // shape[0] if shape[0] else 0
            shape[0] = stop - start
            begin, end = header.start + start * row, header.start + stop * row
        if end == begin:
            return torch.empty(shape, dtype=torch_dtype(header.dtype))
        # Mapped, not copied: fresh memory for every tensor would cost more than the reading. Private, since torch
        # wants memory that it could write to.
        aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
        with header.file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < end:
                raise ValueError(f"{header.file.name} was truncated while it was read: {name} ends at {end}")
            mapped = mmap.mmap(file.fileno(), end - aligned, access=mmap.ACCESS_COPY, offset=aligned)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        dtype = torch_dtype(header.dtype)
        offset = begin - aligned
        if offset % dtype.itemsize:
            return torch.frombuffer(bytearray(mapped[offset:]), dtype=dtype).view(shape)
        return torch.frombuffer(mapped, dtype=dtype, offset=offset).view(shape)

    def load_arguments(self) -> dict[str, Any]:
        """The folder."""
        return {"pretrained_model_name_or_path": str(self.path)}

    def license(self) -> str | None:
        """`license:` in the front matter of the model card."""
        card = self.path / "README.md"
        if not card.is_file():
            return None
        front = card.read_text(encoding="utf-8", errors="replace").split("---")
        match = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if len(front) > 2 else None
        return match[1] if match else None


class RemoteSource(Source):
    """A repository of the Hub of which only the configuration and the headers are fetched."""

    def __init__(self, location: str):
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import NotASafetensorsRepoError

        repository, _, revision = location.partition("@")
        with _hub_errors(location):
            path = Path(hf_hub_download(repository, "config.json", revision=revision or None))
            try:
                metadata = HfApi().get_safetensors_metadata(repository, revision=revision or None)
            except NotASafetensorsRepoError as error:
                raise ValueError(f"{location} holds no weights: no safetensors files") from error
        super().__init__(location, path.parent, revision or path.parent.name)
        self.config = _complete(json.loads(path.read_text(encoding="utf-8")))
        self.headers = {
            name: TensorHeader(tensor.dtype, tuple(tensor.shape), Path(file), *tensor.data_offsets)
            for file, content in metadata.files_metadata.items()
            for name, tensor in content.tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Never: the weights are not here."""
        raise ValueError(f"{self.location} was opened for its headers only")

    def load_arguments(self) -> dict[str, Any]:
        """The repository."""
        return {"pretrained_model_name_or_path": self.location.partition("@")[0], "revision": self.revision}

    def license(self) -> str | None:
        """Not fetched."""
        return None


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

        from .families import family_of

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

        from .families import family_of

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


class BranchedSource(Source):
    """Several sources of one shape; the first speaks for all but the weights.

    Raises:
        ValueError: families, sizes, tensors or vocabularies that differ.
    """

    def __init__(self, sources: list[Source]):
        first = sources[0]
        super().__init__(first.location, first.path, first.revision)
        self._sources = sources
        self.config, self.headers = first.config, first.headers
        for other in sources[1:]:
            self._compare(first, other)

    @staticmethod
    def _compare(first: Source, other: Source) -> None:
        from .families import family_of

        fields = [family_of(source.config).target_fields(source.config) for source in (first, other)]
        pairs = {"model_type": (first.config["model_type"], other.config["model_type"])}
        # Ids of special tokens and initialisation do not change what a weight means.
        ignored = {"initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"}
        pairs |= {name: (value, fields[1][name]) for name, value in fields[0].items() if name not in ignored}
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise ValueError(
                    f"{other.title} has {name}={theirs!r}, {first.title} has {mine!r}: branches must agree"
                )
        if differing := sorted(first.headers.keys() ^ other.headers.keys()):
            raise ValueError(f"{differing[0]} is in one of {first.title} and {other.title} only: branches must agree")
        for name, header in first.headers.items():
            if header.shape != other.headers[name].shape:
                raise ValueError(
                    f"{name} is {list(header.shape)} in {first.title} and {list(other.headers[name].shape)} in "
                    f"{other.title}: branches must agree"
                )
        words = first.vocabulary(), other.vocabulary()
        if words[0] is not None and words[1] is not None and words[0] != words[1]:
            raise ValueError(f"{first.title} and {other.title} have other vocabularies: branches must agree")

    @property
    def branches(self) -> list[Source]:
        """All of them, in order."""
        return self._sources

    @property
    def title(self) -> str:
        """All names."""
        return " + ".join(source.title for source in self._sources)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Of the first."""
        return self._sources[0].read(name, start, stop)

    def load_arguments(self) -> dict[str, Any]:
        """Of the first."""
        return self._sources[0].load_arguments()

    def license(self) -> str | None:
        """The one that all state; None when they differ."""
        names = {source.license() for source in self._sources}
        return names.pop() if len(names) == 1 else None

    def fingerprint(self) -> list[list[Any]]:
        """Of all."""
        return [entry for source in self._sources for entry in source.fingerprint()]


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


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors type name."""
    import torch

    names = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    return names[name]


def _complete(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration as its class fills it in, old spellings of rope included."""
    from .families import family_of

    family_of(raw)  # names the known architectures before Transformers complains about an unknown one
    from transformers import AutoConfig

    raw = {key: value for key, value in raw.items() if key != "transformers_version"}
    try:
        return AutoConfig.for_model(raw.pop("model_type"), **raw).to_dict()
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"config.json is not valid: {' '.join(str(error).split())}") from error


def open_source(source: str | Path | list[str | Path], *, headers_only: bool = False) -> Source:
    """Open a folder, a GGUF file or a Hub id (`owner/name` or `owner/name@revision`), or a list of them as one.

    Args:
        headers_only: of a Hub id, fetch the headers by range requests and no weights; `read` will refuse.
    Raises:
        ValueError: nothing of that name, no weights, a damaged file, an unknown architecture.
        ConnectionError: a Hub id that is neither cached nor reachable.
    """
    if isinstance(source, list):
        sources = [open_source(each, headers_only=headers_only) for each in source]
        return BranchedSource(sources) if len(sources) > 1 else sources[0]
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderSource(str(source), path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path.name} is neither a folder, a .gguf file nor a Hub id")
        return GgufSource(str(source), path)
    if _HUB_ID.fullmatch(str(source)):
        return (RemoteSource if headers_only else _open_hub)(str(source))
    raise ValueError(f"{source} does not exist, and is not a Hub id of the form owner/name")


def _open_hub(source: str) -> Source:
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "README.md", *COPIED_FILES]
    with _hub_errors(source):
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    return FolderSource(source, Path(folder), revision=Path(folder).name)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise ConnectionError(f"the Hub refused {source!r}: {' '.join(str(error).split())[:300]}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise ConnectionError(
            f"{source!r} is no folder here and the Hub cannot be reached: check the name and the network"
        ) from error
