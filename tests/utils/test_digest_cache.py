import hashlib
import json
import os
import random

import pytest

from sagl.errors import UserError
from sagl.utils.digest_cache import cached_sha256
from tests.helpers.errors import refused

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.pt").write_bytes(BODY)
    return tmp_path / "a.pt"


def record(file):
    return json.loads(file.with_name("a.pt.sha256").read_text())


def later(file):
    """The same bytes, touched."""
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


def test_the_digest_of_the_bytes_is_stored_beside_them(file):
    assert cached_sha256(file) == hashlib.sha256(BODY).hexdigest()
    assert record(file) == {
        "sha256": hashlib.sha256(BODY).hexdigest(),
        "length": len(BODY),
        "mtime_ns": file.stat().st_mtime_ns,
    }
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.pt", "a.pt.sha256"]


def test_an_untouched_file_is_not_read_again(file, monkeypatch):
    digest = cached_sha256(file)
    monkeypatch.delattr("hashlib.file_digest")
    assert cached_sha256(file) == digest
    later(file)
    with pytest.raises(AttributeError):
        cached_sha256(file)


def test_a_touched_file_with_the_same_content_is_accepted(file):
    digest = cached_sha256(file)
    later(file)
    assert cached_sha256(file) == digest
    assert record(file)["mtime_ns"] == file.stat().st_mtime_ns


@pytest.mark.parametrize("content", [OTHER, BODY[:-1]])
def test_a_changed_file_is_refused_until_its_record_is_deleted(content, file):
    cached_sha256(file)
    file.write_bytes(content)
    later(file)
    for _ in range(2):  # a refusal does not accept it either
        with refused("`path`", file, "a.pt.sha256"):
            cached_sha256(file)
    file.with_name("a.pt.sha256").unlink()
    assert cached_sha256(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("damaged", ["", "[]", "3", '{"sha256": "00"}'])
def test_a_damaged_record_is_replaced(damaged, file):
    file.with_name("a.pt.sha256").write_text(damaged)
    assert cached_sha256(file) == record(file)["sha256"] == hashlib.sha256(BODY).hexdigest()


def test_the_digest_is_returned_if_no_record_can_be_written(file):
    file.with_name("a.pt.sha256").mkdir()
    assert cached_sha256(file) == hashlib.sha256(BODY).hexdigest()
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.pt", "a.pt.sha256"]


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="`path` must be a file"):
        cached_sha256(tmp_path / "a.pt")
