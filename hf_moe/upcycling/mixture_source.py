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
        _check_layers(set(self.headers), self.config["num_hidden_layers"])


def _check_layers(names: set[str], layers: int) -> None:
    """Refuse a folder in which a layer lacks what another of its kind has: what is not there would be drawn at random.

    Raises:
        ValueError: with the name of the first that is missing.
    """
    of_kind: dict[bool, list[tuple[str, set[str]]]] = {True: [], False: []}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        of_kind[any(".experts." in name for name in own)].append((prefix, own))
    for alike in of_kind.values():
        whole = set[str]().union(*(own for _, own in alike))
        for prefix, own in alike:
            if missing := sorted(whole - own):
                raise ValueError(f"{prefix}{missing[0]} is missing from the weights, though other layers have theirs")
        if alike and not whole:
            raise ValueError(f"{alike[0][0]} is missing from the weights")
