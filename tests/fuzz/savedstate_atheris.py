"""Feed the reader of hcsshim's saved states whatever libFuzzer comes up with. Needs atheris: `pip install atheris`.

    python tests/fuzz/savedstate_atheris.py -max_total_time=600 [CORPUS]

The recordings of tests/vectors are its seeds. It stops at any error but ProtocolError, and at a state that does not
come back as it was. The same is tried, with less patience, by tests/hosts/hcs/test_savedstate.py.
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
    from utilityvm.hosts.hcs import savedstate

VECTORS = Path(__file__).parents[1] / "vectors/hcs_head.json"


def one_input(data: bytes) -> None:
    try:
        state = savedstate.decode(data)
    except ProtocolError:
        return
    assert savedstate.decode(savedstate.encode(state)) == state
    savedstate.section_of(state)


def main() -> None:
    with tempfile.TemporaryDirectory() as seeds:
        for recorded in json.loads(VECTORS.read_text())["controller"]["save_payloads"]:
            (Path(seeds) / recorded["name"]).write_bytes(bytes.fromhex(recorded["payload_hex"]))
        atheris.Setup([*sys.argv, seeds], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
