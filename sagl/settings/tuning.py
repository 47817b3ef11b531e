"""Settings of a search for guidance settings."""

from dataclasses import dataclass

from sagl.errors import require_range
from sagl.settings.evaluation import require_resamples
from sagl.settings.sampling import MAX_SAMPLES


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Settings of `sagl tune`."""

    method: str = "sag"
    """Guidance method whose settings are searched."""
    candidates: int = 32
    """Maximum number of candidates: random combinations of the values."""
    report_samples: int = 1000
    """Images of the report on the best candidate; their ids follow those of the search."""
    bootstrap: int = 200
    """Number of bootstrap resamples of the report's paired 95 % intervals; 0 is off."""

    def __post_init__(self) -> None:
        require_range("candidates", self.candidates, 1, 10_000)
        require_range("report_samples", self.report_samples, 2, MAX_SAMPLES)
        require_resamples(self.bootstrap)
