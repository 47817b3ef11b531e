"""Networks that guide the rows of the page."""

import io
import json
import shlex
import weakref
import zipfile

import pytest

from sagl.playground.session import GUIDED
from sagl.sampling import pipeline
from tests.helpers.commands import exit_code
from tests.helpers.networks import write_grey_classifier, write_grey_unet
from tests.helpers.playground import compare, make_playground


@pytest.fixture
def weaker_networks(monkeypatch):
    """Weak references to the networks that are loaded to guide another one."""
    networks, build = [], pipeline.build_network

    def record(checkpoint):
        network = build(checkpoint)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(pipeline, "build_network", record)
    return networks


def test_a_weaker_network_is_loaded_once_per_version_of_its_file(tmp_path, weaker_networks):
    weak = write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    playground = make_playground(
        tmp_path, "--sag.scale=0", "--autoguidance.scale=1", f"--autoguidance.checkpoint={weak}"
    )
    comparisons = [compare(playground, autoguidance__scale=scale) for scale in (0.5, 1.0, 1.5)]
    for comparison in comparisons:
        playground.offer(comparison)
    assert len({tuple(comparison.rows[GUIDED].images) for comparison in comparisons}) == 3
    assert len(weaker_networks) == 1
    write_grey_unet(weak, num_res_blocks=3)
    compare(playground, autoguidance__scale=2.0)
    assert len(weaker_networks) == 2


def test_guidance_networks_are_dropped_with_the_network_that_they_guided(tmp_path, weaker_networks):
    weak = write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    playground = make_playground(
        tmp_path, "--sag.scale=0", "--autoguidance.scale=1", f"--autoguidance.checkpoint={weak}"
    )
    comparison = compare(playground)
    playground.offer(comparison)
    assert weaker_networks[0]() is not None
    write_grey_unet(tmp_path / "tiny.safetensors", num_res_blocks=3)
    compare(playground, autoguidance__scale=0.0)
    assert weaker_networks[0]() is None


def test_the_guidance_networks_used_last_are_kept(tmp_path, weaker_networks, monkeypatch):
    monkeypatch.setattr("sagl.playground.networks.MAX_GUIDANCE_NETWORKS", 2)
    names = [str(write_grey_unet(tmp_path / f"{blocks}.safetensors", num_res_blocks=blocks)) for blocks in (1, 2, 3)]
    playground = make_playground(
        tmp_path, "--sag.scale=0", "--autoguidance.scale=1", f"--autoguidance.checkpoint={names[0]}", "--allow_files"
    )
    for k, name in enumerate([*names[:2], names[0], names[2]]):
        compare(playground, autoguidance__checkpoint=name, autoguidance__scale=1 + k / 10)
    assert [network() is not None for network in weaker_networks] == [True, False, True]


def test_a_classifier_is_loaded_once(tmp_path, monkeypatch):
    classifiers, build = [], pipeline.build_classifier
    monkeypatch.setattr(pipeline, "build_classifier", lambda file: classifiers.append(file) or build(file))
    classifier = write_grey_classifier(tmp_path / "classifier.safetensors")
    playground = make_playground(tmp_path, f"--classifier.checkpoint={classifier}", "--classifier.scale=1")
    for scale in (1.0, 2.0):
        assert compare(playground, classifier__scale=scale).is_finished
    assert len(classifiers) == 1


def test_a_download_records_the_cost_of_the_weaker_network(tmp_path):
    weak = write_grey_unet(tmp_path / "weak.safetensors", num_res_blocks=2)
    playground = make_playground(
        tmp_path, "--sag.scale=0", "--autoguidance.scale=1", f"--autoguidance.checkpoint={weak}"
    )
    comparison = compare(playground)
    (key,) = playground.offer(comparison).values()
    arguments = shlex.split(comparison.command(GUIDED))[1:]
    assert exit_code(*arguments, "--output", tmp_path / "run") == 0
    with zipfile.ZipFile(io.BytesIO(playground.downloads[key].zip())) as archive:
        recorded = json.loads(archive.read("samples/run.json"))
    expected = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [recorded[name] for name in ("nfe", "flops")] == [expected[name] for name in ("nfe", "flops")]
