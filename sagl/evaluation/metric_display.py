"""Names and number formats of the metrics in tables."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """How a metric is displayed."""

    name: str
    higher_is_better: bool
    digits: int
    """Decimal places; values that are displayed alike count as equal."""
    settings: tuple[str, ...] = ()
    """Names of the settings that the metric depends on."""


_KID = ("kid_subsets", "kid_subset_size", "max_features", "seed")
_NEIGHBORS = ("num_neighbors", "max_features")
METRICS = {
    "fid": MetricInfo(name="FID", higher_is_better=False, digits=2),
    "sfid": MetricInfo(name="sFID", higher_is_better=False, digits=2),
    "fd": MetricInfo(name="Fréchet distance", higher_is_better=False, digits=2),
    "sfd": MetricInfo(name="Fréchet distance, spatial", higher_is_better=False, digits=2),
    "is": MetricInfo(name="IS, chunks of 5,000", higher_is_better=True, digits=2),
    "is_all": MetricInfo(name="IS, all at once", higher_is_better=True, digits=2),
    "precision": MetricInfo(name="precision", higher_is_better=True, digits=3, settings=_NEIGHBORS),
    "recall": MetricInfo(name="recall", higher_is_better=True, digits=3, settings=_NEIGHBORS),
    "kid": MetricInfo(name="KID", higher_is_better=False, digits=5, settings=_KID),
    "kd": MetricInfo(name="kernel distance", higher_is_better=False, digits=5, settings=_KID),
}
"""Known metrics by their names in evaluation.json."""


def metric_name(name: str) -> str:
    """Return the displayed name of a metric."""
    return METRICS[name].name if name in METRICS else name


def format_value(name: str, value: float) -> str:
    """Format a value with the decimal places of its metric."""
    if name not in METRICS:
        return f"{value:.5g}"
    digits = METRICS[name].digits
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def best_values(name: str, values: dict[int, float]) -> set[int]:
    """Return the keys of the best displayed values; empty for an unknown metric, or if all are equal."""
    if name not in METRICS:
        return set()
    info = METRICS[name]
    rounded = {key: round(value, info.digits) for key, value in values.items()}
    best = (max if info.higher_is_better else min)(rounded.values())
    winners = {key for key, value in rounded.items() if value == best}
    return winners if len(winners) < len(values) else set()
