"""What is built for these tests: from a copy, so that nothing lies about in the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout's reach, and return what it prints."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Return the project's files: what git tracks, and what it would track if told to."""
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_symlink() or file.exists()]


@pytest.fixture(scope="session")
def copy_checkout(tracked_files: list[Path]) -> Callable[[Path], Path]:
    def copy(target: Path) -> Path:
        for file in tracked_files:
            to = target / file.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to, follow_symlinks=False)
        return target

    return copy


@pytest.fixture(scope="session")
def copy_without_symlinks(copy_checkout: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Copy the checkout as git lays it out on Windows: a symlink is a text file with its target."""

    def copy(target: Path) -> Path:
        copy_checkout(target)
        link = target / "hydra_llm" / "integrations"
        link.unlink()
        link.write_text("../integrations")
        return target

    return copy


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory, copy_checkout: Callable[[Path], Path]) -> Path:
    """Build the sdist, and the wheel out of that sdist, as a release would."""
    checkout = copy_checkout(tmp_path_factory.mktemp("checkout"))
    run(sys.executable, "-m", "build", "--no-isolation", cwd=checkout)
    return checkout / "dist"


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """Make an environment that has our dependencies, but not us."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", ask, cwd=tmp_path).strip())
    # A line in a .pth file adds that folder alone, not what its own .pth files add: our editable
    # install stays out of sight.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python
