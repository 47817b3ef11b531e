"""The numbers of evaluations, for people: names, digits, and which one is better."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a number is shown, and which one is better."""

    name: str
    better: int
    """-1 the lower one, 1 the higher one."""
    digits: int
    """Behind the point; numbers that look alike are not told apart."""
    settings: tuple[str, ...] = ()
    """It depends on; of others of the measurement it does not."""


_SUBSETS = ("kid_subsets", "kid_subset_size", "max_features", "seed")
METRICS = {
    "fid": Metric(name="FID", better=-1, digits=2),
    "sfid": Metric(name="sFID", better=-1, digits=2),
    "fd": Metric(name="Fréchet distance", better=-1, digits=2),
    "sfd": Metric(name="Fréchet distance, spatial", better=-1, digits=2),
    "is": Metric(name="IS, chunks of 5,000", better=1, digits=2),
    "is_all": Metric(name="IS, all at once", better=1, digits=2),
    "precision": Metric(name="precision", better=1, digits=3, settings=("num_neighbors", "max_features")),
    "recall": Metric(name="recall", better=1, digits=3, settings=("num_neighbors", "max_features")),
    "kid": Metric(name="KID", better=-1, digits=5, settings=_SUBSETS),
    "kd": Metric(name="kernel distance", better=-1, digits=5, settings=_SUBSETS),
}
"""By the names in evaluation.json; others are shown too, and none of theirs is marked."""


def shown(name: str, number: float) -> str:
    """A number of a metric, with the digits that it is shown with."""
    if name not in METRICS:
        return f"{number:.5g}"
    return f"{round(number, METRICS[name].digits) + 0.0:,.{METRICS[name].digits}f}"  # + 0: never -0.00
