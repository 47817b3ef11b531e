"""benchmarks/guidance_study.py: metrics of many settings over the same ids."""

from benchmarks.guidance_study import main
from tests.helpers.errors import refused


def test_several_networks_in_several_processes_are_refused_before_anything_is_sampled(tmp_path):
    flags = ["--also", "--model fashion_mnist", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    with refused("`devices`", "--also"):
        main([*flags, "--output", str(tmp_path / "study")])
    assert list(tmp_path.iterdir()) == []
