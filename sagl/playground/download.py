"""A row of the page as the run folder that `sagl sample` makes of the same settings."""

import io
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from sagl.playground.rows import Row
from sagl.sampling.batch import make_samples
from sagl.sampling.run import SampleConfig, SamplingRun


def zip_run(config: SampleConfig, command: str, row: Row, unguided: Row | None) -> bytes:
    """Write a run folder from images that were sampled already, and return it as a zip file.

    Args:
        config: the resolved command.
        command: command line to record.
        row: its images.
        unguided: the unguided images of the same seeds, for a command with --compare.

    Raises:
        UserError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as parent:
        chosen = row.run.config  # with the batch size and the precision of the images
        output = Path(parent) / "samples"
        config = replace(
            config, output=output, compare=unguided is not None, samples=chosen.samples, devices=chosen.devices
        )
        write_run(SamplingRun.open(config, command), row, unguided)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(config.output.rglob("*")):
                archive.write(path, path.relative_to(parent))
    return file.getvalue()


def write_run(run: SamplingRun, row: Row, unguided: Row | None) -> None:
    """Write the shards, run.json and the exports."""
    run.prepare_folder(run.missing_batches())
    others = [None] * len(row.batches) if unguided is None else unguided.batches
    for batch, other, seconds in zip(row.batches, others, row.seconds, strict=True):
        run.write_samples(row.pipeline, make_samples(run.config.samples.seed, batch, other))
        run.record_batch(row.pipeline, batch.nfe, seconds)
    run.export()
