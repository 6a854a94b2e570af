"""Whatever a node, another router or a file says, it is read without a fault and costs no request.

By hand, for longer: ``python -m tests.fuzz.byhand``.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_what_comes_from_outside_is_read_without_a_fault(name: str, seed: int) -> None:
    TARGETS[name](Random(seed))
