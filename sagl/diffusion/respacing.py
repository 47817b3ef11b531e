"""Respacing: the timesteps of the original process that a sampler with fewer steps uses."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from sagl.errors import UserError, require, whole_number


def respaced_timesteps(
    spec: str, num_timesteps: int, log_snr: Callable[[], Sequence[float]] | None = None
) -> list[int]:
    """Return the timesteps of a respacing, ascending, in guided-diffusion's notation and one more.

    Args:
        spec: "250" for 250 evenly spaced timesteps, first and last included; "10,15,20" for so many in each of three
            equal parts of the process; "ddim25" for 25 at one integer stride, from 0 (DDIM); "logsnr20" for 20 that
            are evenly spaced in log_snr, as far as whole timesteps allow it, first and last included.
        num_timesteps: length of the original process.
        log_snr: returns the log signal-to-noise ratio of every timestep, for "logsnr20". None is enough to check a
            notation.

    Raises:
        UserError: the notation is unknown, or the process has too few timesteps.
    """
    if spec.startswith("ddim"):
        return _fixed_stride(_parse_count(spec.removeprefix("ddim"), spec), num_timesteps, spec)
    if spec.startswith("logsnr"):
        count = _parse_count(spec.removeprefix("logsnr"), spec)
        require(
            count >= 2,
            f"`respacing` must have at least 2 timesteps after logsnr, the first and the last, got {spec!r}.",
        )
        _require_at_most(num_timesteps, count, spec)
        return _evenly_spaced_in(log_snr() if log_snr else range(0, -num_timesteps, -1), count)
    counts = [_parse_count(part, spec) for part in spec.split(",")]
    size, remainder = divmod(num_timesteps, len(counts))
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        _require_at_most(length, count, spec)
        timesteps += [start + offset for offset in _evenly_spaced(count, length)]
        start += length
    return timesteps


def _evenly_spaced(count: int, length: int) -> list[int]:
    """Return `count` offsets from 0 to length - 1, accumulated and rounded as in ADM."""
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    offsets, pos = [], 0.0
    for _ in range(count):
        offsets.append(round(pos))
        pos += stride
    return offsets


def _evenly_spaced_in(values: Sequence[float], count: int) -> list[int]:
    """Return `count` positions (at least 2) in a falling sequence, first and last included, at evenly spaced values.

    Others are the first position at or below their value, moved where two would coincide.
    """
    positions = [0]
    for k in range(1, count):
        value = values[0] + (values[-1] - values[0]) * k / (count - 1)
        position = max(positions[-1] + 1, bisect_left(values, -value, key=lambda v: -v))
        positions.append(min(position, len(values) - count + k))
    return [*positions[:-1], len(values) - 1]


def _fixed_stride(count: int, num_timesteps: int, spec: str) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise UserError(
        f"`respacing` must have a whole stride that gives {count} of {num_timesteps} timesteps, got {spec!r}, for "
        f"which there is none. Try {str(count)!r}."
    )


def _parse_count(text: str, spec: str) -> int:
    if not (count := whole_number(text)):
        raise UserError(f"`respacing` must be like '250', 'ddim25', 'logsnr20' or '10,15,20', got {spec!r:.60}.")
    return count


def _require_at_most(length: int, count: int, spec: str) -> None:
    require(count <= length, f"`respacing` must use at most {length} of {length} timesteps, got {count} in {spec!r}.")
