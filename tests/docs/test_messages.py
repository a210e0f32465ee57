"""The messages that the tables of the pages explain are messages of the package."""

import ast
import re

import pytest
from snippets import PAGES, ROOT

ROWS = re.compile(r"^\| the (?:message|warning) says \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
PAGES = [page for page in PAGES if page.startswith("docs/")]


def explained(page: str) -> list[str]:
    """The phrases in the first column of the tables of messages."""
    text = (ROOT / page).read_text()
    rows = [row for table in ROWS.findall(text) for row in table.splitlines()]
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.fixture(scope="module")
def messages() -> str:
    """All texts of the package, one a line; a null character stands for each inserted value."""
    texts = []
    for path in (ROOT / "iql_torchrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{[^}]*\}", "\0", node.value))
    return "\n".join(text.replace("\n", " ") for text in texts)


@pytest.mark.parametrize("page", [page for page in PAGES if explained(page)])
def test_messages_on_the_page_are_those_of_the_package(page, messages):
    for phrase in explained(page):
        words = [rf"(?:{re.escape(word)}|[^\s\0]*\0[^\s\0]*)" for word in phrase.split()]
        assert re.search(" ".join(words), messages), f"{page}: no message says {phrase!r}"


def test_the_tables_are_read():
    assert len(explained("docs/own_data.md")) > 30
