"""What the rows assert is shown as what a test asserts; and LiteLLM asks the internet nothing."""

import os

import pytest

# Else its import, whichever module does it first, asks for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

pytest.register_assert_rewrite(
    "tests.faults.books", "tests.faults.matrix", "tests.faults.rows", "tests.faults.stage"
)
