"""Fixture of the tests of launchers."""

import pytest

from sagl.utils.launchers import PARENT, RANKS, RENDEZVOUS, SLURM_RANKS, SLURM_TASKS

VARIABLES = (*RANKS, *SLURM_RANKS, *RENDEZVOUS, PARENT, SLURM_TASKS, "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture
def environ(monkeypatch):
    """Set the variables of launchers to exactly the given ones; at first there are none."""

    def replace(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    replace()
    return replace
