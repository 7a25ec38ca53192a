"""`./dev explore --faults` puts each known fault back. Here: that it still can."""

from __future__ import annotations

from pathlib import Path

import pytest

from known_faults import FAULTS, Fault

SOURCE = Path(__file__).parent.parent.parent / "src/utilityvm"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_source_still_has_the_place_of_each_known_fault(fault: Fault) -> None:
    for file, old, new in fault.edits:
        assert (SOURCE / file).read_text().count(old) == 1
        assert old != new
