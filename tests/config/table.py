"""
The table of settings in docs/configuration.md, written anew from the code.

::

    python -m tests.config.table
"""

from pathlib import Path

from hydra_llm.config import settings_table
from tests.helpers import between_marks

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
START = "<!-- settings: written by `python -m tests.config.table` -->\n"
END = "<!-- end of settings -->\n"


def table() -> str:
    lines = ["| Key | Variable | Type | Default | Meaning |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | `{row.env}` | {row.type} | {f'`{row.default}`' if row.default else ''}"
        f" | {row.meaning} |"
        for row in settings_table()
    ]
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    return between_marks(page, START, END, table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
