"""What holds for every file of the project, and for those that people read first."""

import re
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT

# In pieces, so that this file does not name what it forbids.
A_BUILDERS_FOLDERS = [f"/{name}/" for name in ("work", "root")]
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
    )
]

KINDS_OF_CHANGE = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


@pytest.mark.parametrize("words", A_BUILDERS_FOLDERS + REGISTRIES)
def test_no_file_names_the_machine_it_was_written_on_or_a_registry(
    words: str, tracked_files: list[Path]
) -> None:
    readable = [file for file in tracked_files if file.is_file() and not file.is_symlink()]
    naming = [file for file in readable if words.encode() in file.read_bytes()]

    assert not [str(file.relative_to(ROOT)) for file in naming]


def test_the_integrations_are_a_folder_at_the_top_and_a_symlink_in_the_package() -> None:
    link = ROOT / "hydra_llm" / "integrations"
    target = link.readlink().as_posix() if link.is_symlink() else link.read_text()

    assert target == "../integrations"
    assert (ROOT / "integrations" / "__init__.py").is_file()


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)

    assert text.startswith("# Changelog\n")
    assert versions[0] == "[Unreleased]"


def test_each_version_in_the_changelog_keeps_to_the_kinds_of_change_in_their_order() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", section, flags=re.MULTILINE)
        assert kinds == [kind for kind in KINDS_OF_CHANGE if kind in kinds], section.splitlines()[0]
