"""Settings of an evaluation."""

from dataclasses import dataclass

from sagl.errors import require, require_finite

INCEPTION = "inception"
"""The extractor of the literature's numbers, and of published files of statistics."""
EXTRACTORS = (INCEPTION, "effnet_lite0_64", "effnet_lite0_224", "dinov2")
"""Extractors by name; the side that images are resized to is part of it."""
DEFAULT_EXTRACTOR = "effnet_lite0_64"


def require_extractor(name: str, argument: str = "extractor") -> None:
    """One of the names above, or what may be a function of the user's own, as package.function.

    Raises:
        UserError: it is neither.
    """
    own = name.split(".")
    require(
        name in EXTRACTORS or (len(own) > 1 and all(part.isidentifier() for part in own)),
        f"`{argument}` must be one of {', '.join(EXTRACTORS)}, or a function of yours that makes one, as "
        f"package.function, got {name!r}.",
    )


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """How the numbers are taken from the features."""

    neighbours: int = 3
    """k of precision and recall: a ball reaches to the k-th nearest other sample. The literature's is 3."""
    num_kept: int = 10_000
    """Features kept of a reference, evenly spaced, for precision, recall and kernel distance."""
    kid_subsets: int = 100
    """Random subsets of the kernel distance; their mean is reported, and their deviation."""
    kid_subset_size: int = 1000
    """Samples of each."""
    bootstrap: int = 0
    """Draws behind a 95 % interval of the Fréchet distance; 0 is off, 200 is usual."""
    seed: int = 0
    """Of subsets and draws."""

    def __post_init__(self) -> None:
        """Refuse what cannot be counted."""
        require_finite(self)
        for name, least in (("neighbours", 1), ("num_kept", 2), ("kid_subsets", 1), ("kid_subset_size", 2)):
            require(getattr(self, name) >= least, f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        require(
            self.bootstrap == 0 or self.bootstrap >= 20,
            f"`bootstrap` must be 0, which is off, or at least 20 draws, got {self.bootstrap}.",
        )
        require(0 <= self.seed < 2**32, f"`seed` must be in 0 … 2³² - 1, got {self.seed}.")
