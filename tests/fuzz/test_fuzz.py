"""Whatever a node, another router or a file says, it is read without a fault and costs no request.

By hand, for longer: ``python -m tests.fuzz.byhand``.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.byhand import Fed, plain
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_what_comes_from_outside_is_read_without_a_fault(name: str, seed: int) -> None:
    TARGETS[name](Random(seed))


def test_by_hand_the_same_is_run() -> None:
    assert plain(["error"], seconds=0.05, first=0, only=None) == 0
    assert Fed(b"\x05\x07").getrandbits(8) == 5
    assert Fed(b"").randint(0, 9) == 0
