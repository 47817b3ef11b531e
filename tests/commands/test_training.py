from types import SimpleNamespace

import pytest

from sagl.commands import training
from sagl.errors import UserError
from tests.helpers.commands import refusal


def test_processes_that_lightning_started_end_with_rank_0_and_float32_is_not_tf32(monkeypatch):
    calls = []

    def stop(*_):
        raise UserError("enough")

    monkeypatch.setattr(training, "prepare_evaluation", stop)
    monkeypatch.setattr(training, "exit_when_parent_dies", lambda: calls.append("watch"))
    monkeypatch.setattr(training, "disable_tf32", lambda: calls.append("float32"))
    for rank in (0, 1):
        monkeypatch.setattr(training, "global_rank", lambda rank=rank: rank)
        with pytest.raises(UserError, match="enough"):
            training.run("validate", None, SimpleNamespace())
    assert calls == ["float32", "float32", "watch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "sagl.data.npz.NpzData"], "--data.file must be given. --help lists all options."),
        (["--data.rooot", "x"], "there is no option '--data.rooot'. Did you mean --data.root?"),
        (["--data.xyzzy", "x"], "there is no option '--data.xyzzy'."),
        (["--data", "absent_module.Data"], "No module named 'absent_module'. Is its folder in PYTHONPATH?"),
    ],
)
def test_a_wrong_setting_of_the_data_is_named(arguments, message, capsys, tmp_path):
    command = ["fit", "--config", "my_images", *arguments, "--output", tmp_path / "fit"]
    refusal(capsys, tmp_path, *command, names=[message])
