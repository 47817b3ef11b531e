"""Program that lists the keys of an LMDB: `python lmdb_keys.py PATH` writes them to stdout as a numpy file.

lmdb maps the file into memory and trusts it, so that a truncated or damaged database ends the process by a signal.
Therefore `LSUNImageSource` lists the keys in a process of their own.
"""

import io
import os
import sys
from itertools import islice, pairwise
from pathlib import Path

import lmdb
import numpy as np


def read_keys(path: Path) -> "np.ndarray[tuple[int], np.dtype[np.bytes_]]":
    """Return the keys, each with a byte appended, because numpy drops zeros at the end.

    Raises:
        lmdb.Error: the file is no database, or is damaged.
    """
    with lmdb.open(os.fsencode(path), subdir=path.is_dir(), readonly=True, lock=False) as environment:
        file = path / "data.mdb" if path.is_dir() else path
        size, expected = file.stat().st_size, (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if size < expected:
            raise lmdb.CorruptedError(f"it has {size} of {expected} bytes")
        num_entries = environment.stat()["entries"]
        with environment.begin() as transaction:
            keys = list(islice(transaction.cursor().iternext(keys=True, values=False), num_entries + 1))
    if len(keys) != num_entries or any(first >= second for first, second in pairwise(keys)):
        raise lmdb.CorruptedError(f"it should hold {num_entries} keys in their order")
    return np.array([key + b"." for key in keys], dtype=np.bytes_)


if __name__ == "__main__":
    try:
        content = io.BytesIO()  # numpy cannot write to a buffered pipe
        np.save(content, read_keys(Path(sys.argv[1])))
        sys.stdout.buffer.write(content.getbuffer())
    except lmdb.Error as error:
        sys.exit(str(error))
