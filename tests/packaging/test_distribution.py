"""What a user gets: the wheel, the sdist, and the editable install."""

import email
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import hydra_llm
from tests.packaging.conftest import ROOT, run

pytestmark = pytest.mark.timeout(300)

IMPORT_INTEGRATIONS = "import hydra_llm.integrations as room; print(room.__file__)"


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def read(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name).decode()


def test_the_wheel_holds_the_integrations_once_and_under_the_core(wheel: Path) -> None:
    names = names_in(wheel)

    assert names.count("hydra_llm/integrations/__init__.py") == 1
    assert len(names) == len(set(names))


def test_the_wheel_holds_nothing_but_the_package(wheel: Path) -> None:
    folders = {name.split("/")[0] for name in names_in(wheel)}

    assert folders == {"hydra_llm", f"hydra_llm-{hydra_llm.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_the_mark_that_it_is_typed(
    wheel: Path, tracked_files: list[Path]
) -> None:
    paths = [file.relative_to(ROOT) for file in tracked_files if file.suffix == ".py"]
    core = {path.as_posix() for path in paths if path.parts[0] == "hydra_llm"}
    integrations = {
        f"hydra_llm/{path.as_posix()}" for path in paths if path.parts[0] == "integrations"
    }

    assert core | integrations | {"hydra_llm/py.typed"} <= set(names_in(wheel))


def test_the_wheel_holds_the_traces_and_their_licences(wheel: Path) -> None:
    names = [name for name in names_in(wheel) if name.startswith("hydra_llm/replay/traces/")]

    assert sum(name.endswith(".csv.gz") for name in names) == 4
    assert "CC-BY-4.0" in read(wheel, "traces/README.md")
    assert "Version 2.0, January 2004" in read(wheel, "traces/LICENSE-APACHE-2.0.txt")


def test_the_wheel_says_what_it_needs_and_which_extras_there_are(wheel: Path) -> None:
    metadata = email.message_from_string(read(wheel, ".dist-info/METADATA"))
    needs = metadata.get_all("Requires-Dist", [])

    assert metadata["Name"] == "hydra-llm"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {*metadata.get_all("Provides-Extra", [])} == {
        "all", "cli", "dashboard", "dev", "gpu", "langchain", "litellm", "mdns", "plot",
        "redis",
    }  # fmt: skip
    assert {re.split("[<>]", need)[0] for need in needs if "extra ==" not in need} == {
        "h11", "httpcore", "httpx", "ollama", "pydantic", "pydantic-settings", "tomli",
    }  # fmt: skip


def test_the_wheel_brings_the_command(wheel: Path) -> None:
    assert "hydra-llm = hydra_llm.cli:main" in read(wheel, "entry_points.txt")


def test_the_wheel_imports_where_it_is_installed(
    wheel: Path, fresh_python: Path, tmp_path: Path
) -> None:
    run(fresh_python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)

    assert f"{tmp_path}/venv/" in run(fresh_python, "-c", IMPORT_INTEGRATIONS, cwd=tmp_path)
    assert (fresh_python.parent / "hydra-llm").exists()


def test_the_sdist_holds_the_source_and_no_symlink(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        folders = {member.name.split("/")[1] for member in archive if "/" in member.name}
        links = [member.name for member in archive if member.issym() or member.islnk()]

    assert {"CHANGELOG.md", "LICENSE", "hydra_llm", "integrations", "setup.py"} <= folders
    assert not folders & {"docs", "notebooks", "tests"}
    assert not links


def test_a_checkout_without_symlinks_builds_the_same_wheel(
    wheel: Path, tmp_path: Path, copy_without_symlinks: Callable[[Path], Path]
) -> None:
    checkout = copy_without_symlinks(tmp_path / "checkout")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", cwd=checkout)

    (other,) = (checkout / "dist").glob("*.whl")
    assert sorted(names_in(other)) == sorted(names_in(wheel))


@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no symlinks"])
def test_an_editable_install_finds_the_integrations_in_the_checkout(
    *,
    symlinks: bool,
    fresh_python: Path,
    tmp_path: Path,
    copy_checkout: Callable[[Path], Path],
    copy_without_symlinks: Callable[[Path], Path],
) -> None:
    checkout = (copy_checkout if symlinks else copy_without_symlinks)(tmp_path / "checkout")
    pip_install = (fresh_python, "-m", "pip", "install", "--quiet", "--no-deps")
    run(*pip_install, "--no-build-isolation", "--editable", checkout, cwd=tmp_path)

    found = Path(run(fresh_python, "-c", IMPORT_INTEGRATIONS, cwd=tmp_path).strip())
    assert found.resolve() == checkout.resolve() / "integrations" / "__init__.py"
