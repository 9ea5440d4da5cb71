"""A folder or Hub id that holds a mixture already: ours, or one of Transformers' own."""

from pathlib import Path

from .formats import MIXTURES
from .headers import read_folder
from .sources import FolderSource, filled_in, hub_folder, read_config


class MixtureSource(FolderSource):
    """A folder that holds a mixture already: ours, or one of `MIXTURES`."""

    def __init__(self, location: str):
        fetched = hub_folder(location)
        path = fetched or Path(location).expanduser()
        # Not FolderSource's: that one wants a dense family.
        super(FolderSource, self).__init__(location, path, fetched.name if fetched else None)
        raw = read_config(path)
        self.model_type = raw.get("model_type")
        if self.model_type not in ("hf_moe", *MIXTURES):
            known = ", ".join(["hf_moe", *MIXTURES])
            raise ValueError(f"{path} holds a {self.model_type!r} model; known are {known}")
        self.config = filled_in(raw)
        self.headers = self._stored = read_folder(path)
        self._encodings = {}
