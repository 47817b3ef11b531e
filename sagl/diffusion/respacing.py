"""Respacing: the timesteps of the original process that a sampler with fewer steps uses."""

from sagl.errors import UserError, require


def respaced_timesteps(spec: str, num_timesteps: int) -> list[int]:
    """Return the timesteps of a respacing, ascending, in guided-diffusion's notation.

    Args:
        spec: "250" for 250 evenly spaced timesteps, first and last included; "10,15,20" for so many in each of three
            equal parts of the process; "ddim25" for 25 at one integer stride, from 0 (DDIM).
        num_timesteps: length of the original process.

    Raises:
        UserError: the notation is unknown, or the process has too few timesteps.
    """
    if spec.startswith("ddim"):
        return _fixed_stride(_parse_count(spec.removeprefix("ddim"), spec), num_timesteps, spec)
    counts = [_parse_count(part, spec) for part in spec.split(",")]
    size, remainder = divmod(num_timesteps, len(counts))
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        require(
            count <= length, f"`respacing` must use at most {length} of {length} timesteps, got {count} in {spec!r}."
        )
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


def _fixed_stride(count: int, num_timesteps: int, spec: str) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise UserError(
        f"`respacing` must have a whole stride that gives {count} of {num_timesteps} timesteps, got {spec!r}, for "
        f"which there is none. Try {str(count)!r}."
    )


def _parse_count(text: str, spec: str) -> int:
    require(
        text.strip().isdecimal() and int(text) > 0,
        f"`respacing` must be like '250', 'ddim25' or '10,15,20', got {spec!r}.",
    )
    return int(text)
