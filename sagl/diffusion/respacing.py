"""Which timesteps of the original process a shorter chain keeps: step index <-> timestep."""

from sagl.errors import UserError, require


def respaced_timesteps(spec: str, num_timesteps: int) -> list[int]:
    """Timesteps kept, ascending, under guided-diffusion's notation.

    Args:
        spec: "250" keeps 250 evenly spaced timesteps, first and last included; "10,15,20" splits the process in
            three equal parts and keeps so many of each; "ddim25" keeps 25 at one integer stride, from 0 (DDIM).
        num_timesteps: length of the original process.

    Raises:
        UserError: the notation is unknown, or the process has too few timesteps.
    """
    if spec.startswith("ddim"):
        return _strided(_count(spec.removeprefix("ddim"), spec), num_timesteps, spec)
    counts = [_count(part, spec) for part in spec.split(",")]
    size, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        require(
            count <= length, f"`respacing` keeps {count} of {length} timesteps in {spec!r}: at most {length} are there."
        )
        kept += [start + offset for offset in _even(count, length)]
        start += length
    return kept


def _even(count: int, length: int) -> list[int]:
    """`count` offsets from 0 to length - 1, as even as whole numbers allow (accumulated, then rounded, as in ADM)."""
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    offsets, at = [], 0.0
    for _ in range(count):
        offsets.append(round(at))
        at += stride
    return offsets


def _strided(count: int, num_timesteps: int, spec: str) -> list[int]:
    """Every k-th timestep from 0, for the k that gives exactly `count` of them."""
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise UserError(
        f"`respacing` {spec!r} needs a whole stride that keeps {count} of {num_timesteps} timesteps, "
        f"and there is none. Try {str(count)!r}."
    )


def _count(text: str, spec: str) -> int:
    """A whole number of steps."""
    require(
        text.strip().isdecimal() and int(text) > 0,
        f"`respacing` must be like '250', 'ddim25' or '10,15,20', got {spec!r}.",
    )
    return int(text)
