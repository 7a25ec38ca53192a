"""Feed the gob decoder whatever libFuzzer comes up with. Needs atheris: `pip install atheris`.

    python tests/fuzz/gob_atheris.py -max_total_time=600 [CORPUS]

The recordings of tests/vectors are its seeds. It stops at any error but ProtocolError, and at a mount that does not
come back as it was. The same is tried, with less patience, by tests/hosts/hcs/test_gob.py.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["utilityvm.hosts.hcs"]):
    from utilityvm.errors import ProtocolError
    from utilityvm.hosts.hcs import clone, gob

VECTORS = Path(__file__).parents[1] / "vectors/gob.json"


def one_input(data: bytes) -> None:
    for read in (gob.decode_outer, gob.decode_value, clone.load):
        try:
            read(data)
        except ProtocolError:
            continue
    try:
        mount = gob.decode(data)
    except ProtocolError:
        return
    assert gob.decode(gob.encode(mount)) == mount


def main() -> None:
    with tempfile.TemporaryDirectory() as seeds:
        for kind, vectors in json.loads(VECTORS.read_text()).items():
            if isinstance(vectors, list) and kind != "layout":
                for number, vector in enumerate(vectors):
                    (Path(seeds) / f"{kind}-{number}").write_bytes(bytes.fromhex(vector["hex"]))
        atheris.Setup([*sys.argv, seeds], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
