import pytest
import torch

from sagl.callbacks.loss_table import rows

METRICS = {
    "val/loss": 0.5,
    "val/mse": 0.25,
    "val/bits_per_dim": 3.0,
    "val/bits_per_dim_squared": 9.25,
    "val/images": 25,
}
METRICS |= {f"val/loss_quarter_{q}": 0.1 * q for q in range(4)}


def table(**more):
    named = {name.replace("__", "/"): value for name, value in more.items()}
    return dict(rows({name: torch.tensor(float(v)) for name, v in {**METRICS, **named}.items()}, 400))


def test_the_table_has_the_loss_whole_and_by_quarter_with_the_timesteps_of_each():
    found = table()
    assert (found["loss"], found["mse"]) == ("0.50000", "0.25000")
    assert found["  at timesteps 0 to 99"] == "0.00000"
    assert found["  at timesteps 300 to 399"] == "0.30000"


def test_bits_per_dim_come_with_the_standard_error_of_the_mean():
    assert table()["bits/dim"] == "3.000 ± 0.100"  # √(9.25 - 9) / √25


def test_a_quarter_without_images_is_left_out():
    short = {name: torch.tensor(float(value)) for name, value in METRICS.items() if name != "val/loss_quarter_2"}
    assert not any("200 to 299" in name for name, _ in rows(short, 400))


@pytest.mark.parametrize(
    ("name", "line"),
    [("frechet_0.3", "frechet at scale 0.3"), ("inception_score_0", "inception score at scale 0")],
)
def test_numbers_of_previews_are_lines_where_they_were_taken(name, line):
    assert table(**{f"val__{name}": 7.126})[line] == "7.13"
    assert line not in table()


def test_a_classifiers_table_has_accuracies_and_no_likelihood():
    metrics = {"val/loss": 0.5, "val/accuracy": 0.75, "val/accuracy_quarter_0": 0.9, "val/images": 4}
    found = rows({name: torch.tensor(float(value)) for name, value in metrics.items()}, 400)
    assert found == [("loss", "0.50000"), ("accuracy", "0.75000"), ("  at timesteps 0 to 99", "0.90000")]
