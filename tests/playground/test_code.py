import ast
from dataclasses import replace

import pytest
import torch

from sagl.configuration.sample import parse_sample_config
from sagl.playground import code
from sagl.sampling.run import SamplingRun


@pytest.fixture
def run():
    return SamplingRun.without_folder(parse_sample_config(["--trainer.accelerator", "cpu"]))


def called(run):
    """Return the names of the functions that the program of a run calls."""
    calls = [node for node in ast.walk(ast.parse(code.python_text(run))) if isinstance(node, ast.Call)]
    return {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_program_for_a_gpu_has_the_settings_of_torch_that_the_page_has(device, run, monkeypatch):
    monkeypatch.setattr(code, "select_device", lambda _: torch.device(device))
    settings = {"disable_tf32", "use_deterministic_algorithms"}
    assert called(run) & settings == (settings if device == "cuda" else set())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_program_compiles_the_network_if_the_page_does(compiled, run):
    run.config = replace(run.config, devices=replace(run.config.devices, compile=compiled))
    assert ("network.compile" in called(run)) == compiled
