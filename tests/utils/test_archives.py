import zipfile
from zipfile import BadZipFile

import numpy as np
import pytest

from sagl.utils.archives import array_names, check_archive, read_arrays

ARRAYS = {
    "pixels": np.arange(6000, dtype=np.uint8).reshape(3, -1),
    "name": np.array("inception"),
    "none": np.zeros((0, 3)),
}
SAVE_FUNCTIONS = [np.savez, np.savez_compressed]


@pytest.fixture(params=SAVE_FUNCTIONS)
def archive(request, tmp_path):
    request.param(tmp_path / "a.npz", **ARRAYS)
    return tmp_path / "a.npz"


def test_the_arrays_of_a_file_are_those_that_numpy_wrote(archive):
    assert array_names(archive) == list(ARRAYS)
    arrays = read_arrays(archive, [*ARRAYS, "absent"])
    assert arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    check_archive(archive)


@pytest.mark.parametrize("read", [check_archive, lambda path: read_arrays(path, ARRAYS)])
@pytest.mark.parametrize("save", SAVE_FUNCTIONS)
def test_a_changed_byte_gives_the_same_arrays_or_is_refused(save, read, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    whole, path, refused = (tmp_path / "a.npz").read_bytes(), tmp_path / "b.npz", 0
    for position in np.random.default_rng(0).integers(len(whole), size=200):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 64]) + whole[position + 1 :])
        try:
            arrays = read(path) or ARRAYS
        except BadZipFile:
            refused += 1
        else:  # a time, a comment, the name of an array
            assert all(np.array_equal(array, ARRAYS[name]) for name, array in arrays.items())
    assert refused > 100


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_claims_more_bytes_than_there_are_asks_for_no_memory(compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as file, file.open("arr_0.npy", "w") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(bytes(10_000))
    with pytest.raises(BadZipFile):
        read_arrays(tmp_path / "a.npz", ["arr_0"])


@pytest.mark.parametrize(
    "descr", ["{'descr'", "\x00\x00", "(((", "{'descr': '|O', 'fortran_order': False, 'shape': ()}"]
)
def test_an_array_whose_header_is_damaged_or_names_python_objects_is_refused(descr, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        header = descr.ljust(117).encode() + b"\n"
        file.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(BadZipFile):
        read_arrays(tmp_path / "a.npz", ["arr_0"])
