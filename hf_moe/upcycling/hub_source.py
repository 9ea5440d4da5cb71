"""Repositories of the Hub: downloaded, or their headers alone by range requests."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .headers import TensorHeader
from .sources import COPIED_FILES, FolderSource, Source, complete

if TYPE_CHECKING:
    import torch


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
        self.config = complete(json.loads(path.read_text(encoding="utf-8")))
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


def download(source: str) -> Source:
    """Fetch what a conversion reads, into the Hub's cache."""
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
