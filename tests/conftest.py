"""What every test has: a watch on what it leaves behind, and nothing of the machine's settings."""

import os

import pytest
from hypothesis import settings

pytest_plugins = ["tests.leaks"]

# Time is pytest-timeout's business: on a busy machine Hypothesis' own 200 ms fail by chance.
settings.register_profile("unhurried", parent=settings.default, deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what the machine says about nodes and proxies, as its owner may really use them."""
    for name in os.environ:
        if name.startswith(("HYDRA_", "OLLAMA_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
