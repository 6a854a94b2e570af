"""What every test has: a watch on what it leaves behind, and nothing of the machine's settings."""

import gc
import io
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from hydra_llm.probes.amd import AmdReader
from hydra_llm.probes.apple import AppleReader
from hydra_llm.probes.nvml import NvmlReader
from tests.probes.fake_nvml import Nvml

pytest_plugins = ["tests.leaks"]

# Time is pytest-timeout's business: on a busy machine Hypothesis' own 200 ms fail by chance.
settings.register_profile("unhurried", parent=settings.default, deadline=None)
settings.load_profile("unhurried")

_numbers = itertools.count()


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays: of LiteLLM alone 400,000 objects, 0.25 s a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's state directory, far from the real one; of what tests start in processes too."""
    home = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
            patch.setenv(name, str(home))
        yield home


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, state_home: Path) -> None:
    """Hide what the machine says about nodes and proxies, as its owner may really use them."""
    for name in os.environ:
        if name.startswith(("HYDRA_", "OLLAMA_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # Nothing is kept from router to router, unless a test names a state_dir; what runs in a
    # process of its own keeps it for its test alone.
    monkeypatch.setattr("hydra_llm.config._user_state_dir", lambda: None)
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(state_home / str(next(_numbers))))


@pytest.fixture(autouse=True)
def no_gpu_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """
    Hide the GPUs that the machine may have: simulated nodes are on it and would be measured there.

    Whoever makes a reader of its own still sees them, as the tests of real cards do.
    """
    without_driver = Nvml(init_error=12)
    empty = tmp_path_factory.getbasetemp()
    local = "hydra_llm.probes.local"
    monkeypatch.setattr(f"{local}.NvmlReader", partial(NvmlReader, load=lambda: without_driver))
    monkeypatch.setattr(f"{local}.AmdReader", partial(AmdReader, root=empty))
    monkeypatch.setattr(f"{local}.AppleReader", partial(AppleReader, platform=""))


@pytest.fixture(scope="session")
def matplotlib_fonts() -> None:
    """Have matplotlib open its fonts, which it never closes, before open files are counted."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_xscale("log")
    figure.savefig(io.BytesIO(), format="png")
