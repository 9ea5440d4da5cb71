"""Where weights come from: a folder of safetensors, a GGUF file, a repository of the Hub.

All look alike: a configuration, headers by the names that Transformers uses, and `read`.
"""

import json
import mmap
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import family_of
from .headers import TensorHeader, read_folder
from .quantised import added_biases, encodings, presented
from .wrapped import language_model, text_config

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# A configuration divides by some of these; its class checks no more than that they are numbers.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
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
        left_out: modules beside the language model, such as those that look at pictures.
    """

    def __init__(self, location: str, path: Path, revision: str | None = None):
        self.location = location
        self.path = path
        self.revision = revision
        self.config: dict[str, Any] = {}
        self.headers: dict[str, TensorHeader] = {}
        self.left_out: list[str] = []

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

    def has_tokenizer(self) -> bool:
        """Whether text can be turned into its tokens."""
        return holds_tokenizer(self.path)

    @property
    def foreign(self) -> bool:
        """Whether Transformers by itself would load something else than the language model in plain numbers."""
        return False

    @property
    def nbytes(self) -> int:
        """Size of the weights as they are stored; `headers` say what they are once read."""
        return sum(header.nbytes for header in self.headers.values())

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
        raw = read_config(path)
        family_of(text_config(raw) or raw)  # before weights are looked for that nobody could convert
        raw, self._stored, self.left_out = language_model(raw, read_folder(path))
        self.config = complete(raw)
        self._encodings = encodings(raw, self._stored)
        self.headers = presented(self._stored, self._encodings)
        for name in self._unused_biases():
            del self.headers[name]

    @property
    def foreign(self) -> bool:
        """Whether weights are stored in few bits and read in float32, or stand inside of a larger model."""
        return bool(self._encodings or self.left_out)

    @property
    def nbytes(self) -> int:
        """Of all stored tensors, scales and zero points included."""
        return sum(header.nbytes for header in self._stored.values())

    def _unused_biases(self) -> list[str]:
        """Biases that packers gave to modules without one: zero in every layer."""
        kinds = added_biases(self._stored, self._encodings)
        return [bias for kind in kinds if all(map(self._is_zero, kind)) for bias in kind]

    def _is_zero(self, name: str) -> bool:
        header = self._stored[name]
        with header.file.open("rb") as file:
            file.seek(header.start)
            return not file.read(header.nbytes).strip(b"\0")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Reads the asked rows only; dequantises them where need be."""
        if name not in self._encodings:
            return self._read_stored(name, start, stop)
        encoding = self._encodings[name]
        stop = encoding.shape[0] if stop is None else min(stop, encoding.shape[0])
        stored = {
            role: self._read_stored(part, start, stop) if role in encoding.rows else self._read_stored(part, 0, None)
            for role, part in encoding.parts.items()
        }
        try:
            return encoding.decode(stored, start, stop)
        except ValueError as error:
            raise ValueError(f"{name} cannot be dequantised: {error}") from error

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
        if hasattr(mmap, "MADV_WILLNEED"):
            # Begin to read all of it now: page by page, as it is touched, a disk gives a fifth of its speed.
            mapped.madvise(mmap.MADV_WILLNEED)
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


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


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


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it stands there.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json, so its architecture is unknown")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not an object of options")
    return raw


def model_config(model: str) -> dict[str, Any]:
    """The configuration of any model that Transformers knows, from a folder or a Hub id, every default filled in.

    Raises:
        ValueError: no config.json, or one that is not valid. ConnectionError: the Hub is out of reach.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(model):
            raise ValueError(f"{model} does not exist, and is not a Hub id of the form owner/name")
        from .hub_source import fetch_config

        folder = fetch_config(model)
    raw = read_config(folder)
    return filled_in(text_config(raw) or raw)


def hub_folder(source: str) -> Path | None:
    """The fetched folder of a Hub id; None of what is a folder here or no id."""
    if Path(source).expanduser().exists() or not _HUB_ID.fullmatch(source):
        return None
    from .hub_source import fetch

    return fetch(source)


def complete(raw: dict[str, Any]) -> dict[str, Any]:
    """A dense configuration as its class fills it in, old spellings of rope included."""
    family_of(raw)  # names the known architectures before Transformers complains about an unknown one
    return filled_in(raw)


def filled_in(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration with every default of its class.

    Raises:
        ValueError: an option that the class refuses, or a size below 1.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    raw = {key: value for key, value in raw.items() if key != "transformers_version"}
    for name in _SIZES:
        # None is the class's default.
        if (size := raw.get(name)) is not None and not (isinstance(size, int) and size >= 1):
            raise ValueError(f"config.json is not valid: {name}={size!r} must be a whole number of at least 1")
    try:
        return AutoConfig.for_model(raw.pop("model_type"), **raw).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
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
        from .branches import BranchedSource

        return BranchedSource(sources) if len(sources) > 1 else sources[0]
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderSource(str(source), path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path.name} is neither a folder, a .gguf file nor a Hub id")
        from .gguf_source import GgufSource

        return GgufSource(str(source), path)
    if _HUB_ID.fullmatch(str(source)):
        from .hub_source import RemoteSource, download

        return RemoteSource(str(source)) if headers_only else download(str(source))
    raise ValueError(f"{source} does not exist, and is not a Hub id of the form owner/name")
