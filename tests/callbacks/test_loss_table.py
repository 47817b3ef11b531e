import pytest
import torch

from sagl.callbacks.loss_table import rows

METRICS = {"val/loss": 0.5, "val/mse": 0.25, "val/bits_per_dim": 3.0, "val/bits_per_dim_squared": 9.25}
METRICS |= {"val/num_images": 25} | {f"val/loss_q{q}": 0.1 * q for q in range(4)}


def table(metrics):
    return dict(rows({name: torch.tensor(float(value)) for name, value in metrics.items()}, 400))


def test_the_table_has_the_loss_whole_and_by_range_of_timesteps_and_bits_per_dim_with_its_standard_error():
    assert table(METRICS) == {
        "loss": "0.50000",
        "  at timesteps 0 to 99": "0.00000",
        "  at timesteps 100 to 199": "0.10000",
        "  at timesteps 200 to 299": "0.20000",
        "  at timesteps 300 to 399": "0.30000",
        "mse": "0.25000",
        "bits/dim": "3.000 ± 0.100",  # √(9.25 - 9) / √25
    }


def test_a_range_of_timesteps_without_images_has_no_row():
    assert not any("200 to 299" in name for name in table({k: v for k, v in METRICS.items() if k != "val/loss_q2"}))


@pytest.mark.parametrize(
    ("name", "row"),
    [("frechet_0.3", "frechet at scale 0.3"), ("inception_score_0", "inception score at scale 0")],
)
def test_metrics_of_previews_have_rows_if_they_were_computed(name, row):
    assert table({**METRICS, f"val/{name}": 7.126})[row] == "7.13"
    assert row not in table(METRICS)


def test_the_table_of_a_classifier_has_accuracies_and_no_likelihood():
    metrics = {"val/loss": 0.5, "val/accuracy": 0.75, "val/accuracy_q0": 0.9, "val/num_images": 4}
    assert table(metrics) == {"loss": "0.50000", "accuracy": "0.75000", "  at timesteps 0 to 99": "0.90000"}
