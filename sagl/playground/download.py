"""A row of the page as the run folder that `sagl sample` makes of the same settings."""

import io
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from sagl.playground.rows import Row
from sagl.sampling.batch import make_samples
from sagl.sampling.pipeline import SamplingPipeline
from sagl.sampling.run import SampleConfig, SamplingRun


@dataclass(frozen=True, kw_only=True)
class Download:
    """A run folder that can be made of images that were sampled already."""

    config: SampleConfig
    """The resolved command."""
    command: str
    """Command line to record."""
    row: Row
    unguided: Row | None
    """Unguided images of the same seeds, for a command with --compare."""

    def zip(self) -> bytes:
        """Write the run folder, and return it as a zip file.

        Raises:
            UserError: a weight file is not that of the images any more, another network was loaded since, or the folder
                cannot be written.
        """
        self._check_files()
        pipeline = self.row.pipeline
        with tempfile.TemporaryDirectory() as parent:
            sampled = self.row.run.config  # with the batch size and the precision of the images
            config = replace(
                self.config,
                output=Path(parent) / "samples",
                compare=self.unguided is not None,
                samples=sampled.samples,
                devices=sampled.devices,
            )
            run = SamplingRun.open(config, self.command)
            self._check_files()  # it has read them for their digests
            self._write(run, pipeline)
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(config.output.rglob("*")):
                    archive.write(path, path.relative_to(parent))
        return file.getvalue()

    def _check_files(self) -> None:
        for row in (self.row, self.unguided):
            if row is not None:
                row.check_files()

    def _write(self, run: SamplingRun, pipeline: SamplingPipeline) -> None:
        """Write the shards, run.json with the cost of the pipeline, and the exports."""
        run.prepare_folder(run.missing_batches())
        row = self.row
        others = [None] * len(row.batches) if self.unguided is None else self.unguided.batches
        for batch, other, seconds in zip(row.batches, others, row.seconds, strict=True):
            run.write_samples(pipeline, make_samples(run.config.samples.seed, batch, other))
            run.record_batch(pipeline, batch, seconds)
        run.export()
