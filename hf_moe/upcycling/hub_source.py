"""Repositories of the Hub: downloaded, or their headers alone by range requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .headers import TensorHeader
from .quantised import added_biases, encodings, presented
from .sources import COPIED_FILES, FolderSource, Source, complete, read_config
from .wrapped import language_model

if TYPE_CHECKING:
    import torch

_NOWHERE = "{!r} is no folder here and the Hub cannot be reached: check the name and the network"


class RemoteSource(Source):
    """A repository of the Hub of which only the configuration and the headers are fetched."""

    def __init__(self, location: str):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import NotASafetensorsRepoError

        repository, _, revision = location.partition("@")
        path = fetch_config(location)
        with hub_errors(location, _NOWHERE.format(location)):
            try:
                metadata = HfApi().get_safetensors_metadata(repository, revision=revision or None)
            except NotASafetensorsRepoError as error:
                raise ValueError(f"{location} holds no weights: no safetensors files") from error
        super().__init__(location, path, revision or path.name)
        stored = {
            name: TensorHeader(tensor.dtype, tuple(tensor.shape), Path(file), *tensor.data_offsets)
            for file, content in metadata.files_metadata.items()
            for name, tensor in content.tensors.items()
        }
        raw, self._stored, self.left_out = language_model(read_config(path), stored)
        self.config = complete(raw)
        encoded = encodings(raw, self._stored)
        self.headers = presented(self._stored, encoded)
        for kind in added_biases(self._stored, encoded):
            # One layer's stands for all here; a conversion looks at every one.
            if self._is_zero(kind[0]):
                for name in kind:
                    del self.headers[name]

    def _is_zero(self, name: str) -> bool:
        """Whether a small tensor is of zeros, by range requests."""
        header, begin = self._stored[name], 8 + int.from_bytes(self._fetch(name, 0, 8), "little")
        return not self._fetch(name, begin + header.start, begin + header.stop).strip(b"\0")

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of the file that holds a tensor."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.location.partition("@")[0], str(self._stored[name].file), revision=self.revision)
        with hub_errors(self.location, _NOWHERE.format(self.location)):
            response = get_session().get(url, headers=build_hf_headers() | {"range": f"bytes={start}-{stop - 1}"})
            hf_raise_for_status(response)
        return response.content

    @property
    def nbytes(self) -> int:
        """Of all stored tensors."""
        return sum(header.nbytes for header in self._stored.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Never: the weights are not here."""
        raise ValueError(f"{self.location} was opened for its headers only")

    def load_arguments(self) -> dict[str, Any]:
        """The repository."""
        return {"pretrained_model_name_or_path": self.location.partition("@")[0], "revision": self.revision}

    def license(self) -> str | None:
        """Not fetched."""
        return None


def fetch_config(location: str) -> Path:
    """The folder of the Hub's cache that holds the repository's config.json."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = location.partition("@")
    with hub_errors(location, _NOWHERE.format(location)):
        return Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent


def download(source: str) -> Source:
    """A dense repository, fetched."""
    folder = fetch(source)
    return FolderSource(source, folder, revision=folder.name)


def fetch(source: str) -> Path:
    """Fetch what a conversion reads, into the Hub's cache; its folder there is named after the commit."""
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "README.md", *COPIED_FILES]
    with hub_errors(source, _NOWHERE.format(source)):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))


@contextmanager
def hub_errors(name: str, unreachable: str) -> Iterator[None]:
    """What the Hub or the way to it is to blame for, as a ConnectionError.

    An error of a file on this machine (full disk, no permission) passes as it is. `unreachable` is the sentence for a
    Hub that does not answer.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except HfHubHTTPError as error:
        raise ConnectionError(f"the Hub refused {name!r}: {' '.join(str(error).split())[:300]}") from error
    # The first is what a download says without network and cache; OfflineModeIsEnabled is a ConnectionError.
    except (LocalEntryNotFoundError, HTTPError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(unreachable) from error
