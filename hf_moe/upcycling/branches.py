"""Several sources of one shape as one, for mode `branch`."""

from typing import TYPE_CHECKING, Any

from .families import family_of
from .sources import Source

if TYPE_CHECKING:
    import torch


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

    @property
    def nbytes(self) -> int:
        """Of all."""
        return sum(source.nbytes for source in self._sources)

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
