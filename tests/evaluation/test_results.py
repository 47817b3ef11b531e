import json
from dataclasses import replace

import pytest

from sagl.errors import UserError
from sagl.evaluation.results import EVALUATIONS, Evaluation, read_evaluations, save_result
from tests.helpers.sampled import entry


def write(folder, *entries):
    (folder / EVALUATIONS).write_text(json.dumps({"evaluations": entries}))


def test_a_run_that_was_not_measured_has_no_evaluations(tmp_path):
    assert read_evaluations(tmp_path) == ()


def test_all_that_a_number_depends_on_is_read_with_it_in_the_order_of_the_file(tmp_path):
    write(tmp_path, entry({"fd": 12.3, "is": 4}, intervals={"fd": [12, 12.6]}), entry({}, extractor="inception"))
    first, second = read_evaluations(tmp_path)
    assert first == Evaluation(
        extractor="effnet_lite0_64",
        reference="fashion_mnist_test",
        num_samples=20000,
        num_reference=10000,
        resize="bilinear to 64×64",
        numbers={"fd": 12.3, "is": 4.0},
        intervals={"fd": (12.0, 12.6)},
        settings={"num_neighbors": 3, "is_chunk": 5000, "kid_subsets": 100, "kid_subset_size": 1000},
        images="x",
        seconds=12.1,
    )
    assert (second.extractor, second.numbers) == ("inception", {})


@pytest.mark.parametrize("missing", ["num_reference", "resize", "intervals", "settings", "seconds", "images"])
def test_what_a_number_can_do_without_may_be_missing(missing, tmp_path):
    found = entry({"fd": 12.3})
    del found[missing]
    write(tmp_path, found)
    assert read_evaluations(tmp_path)[0].numbers == {"fd": 12.3}


def test_a_number_that_was_not_taken_is_left_out(tmp_path):
    write(tmp_path, entry({"fd": 12.3, "kd": None}, intervals={"fd": None}))
    (found,) = read_evaluations(tmp_path)
    assert (found.numbers, found.intervals) == ({"fd": 12.3}, {})


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": 3},
        {"reference": None},
        {"num_samples": "many"},
        {"num_samples": 2.5},
        {"num_samples": True},
        {"num_reference": "all"},
        {"numbers": [12.3]},
        {"numbers": {"fd": "12.3"}},
        {"numbers": {"fd": float("nan")}},
        {"numbers": {"fd": float("inf")}},
        {"numbers": {"fd": 10**400}},
        {"intervals": {"fd": 12.0}},
        {"intervals": {"fd": [12.0]}},
        {"intervals": {"fd": ["low", "high"]}},
        {"settings": ["num_neighbors"]},
    ],
    ids=str,
)
def test_an_entry_of_another_kind_is_damage(change, tmp_path):
    write(tmp_path, entry({"fd": 12.3}) | change)
    with pytest.raises(UserError, match=r"evaluation\.json is damaged. Delete it; sagl evaluate makes it again"):
        read_evaluations(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"{}", b'{"evaluations": 3}', b'{"evaluations": [3]}', b"\xff"]
)
def test_a_file_that_is_no_list_of_evaluations_is_damage(text, tmp_path):
    (tmp_path / EVALUATIONS).write_bytes(text)
    with pytest.raises(UserError, match=r"`run` must hold a whole evaluation\.json"):
        read_evaluations(tmp_path)


def test_what_is_kept_is_read_and_replaces_the_same_measurement(tmp_path):
    about = {"extractor": "tiny", "reference": "r", "num_samples": 9, "images": "run", "notes": ("few",)}
    first = Evaluation(**about, numbers={"fd": 1.0, "kd": 0.1}, deviations={"kd": 0.01}, intervals={"fd": (0.5, 2.0)})
    other = replace(first, settings={"seed": 1})
    for made in (first, other, replace(first, numbers={"fd": 3.0})):
        save_result(tmp_path, made)
    assert read_evaluations(tmp_path) == (other, replace(first, numbers={"fd": 3.0}))
