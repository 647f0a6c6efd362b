"""`tests/fuzz.py` for seconds, on the same input each time."""

from __future__ import annotations

import pytest

from tests.fuzz import TARGETS, fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_what_others_wrote_gives_a_result_or_one_error(name: str) -> None:
    fuzz(name, 150, fixed=True)
