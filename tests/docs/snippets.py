"""The Python blocks of a Markdown page, in parts of one namespace each, and what they print.

The blocks of a part run in their order. A comment on the line before a block changes what follows:

- ``<!-- snippet: new -->``: a part begins, with an empty namespace and an empty folder.
- ``<!-- snippet: slow -->``: this block and the rest of its part are run by tests marked ``slow``.
- ``<!-- snippet: requires onnxruntime -->``: where a module is missing, the part is skipped from here.
- ``<!-- output -->`` before a ``text`` block: it is compared with what the block before it printed.

Blocks of ``py`` are not run: code of other libraries, on the page ``docs/coming_from.md`` alone.
"""

import contextlib
import io
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "examples/README.md", "benchmarks/README.md", "CONTRIBUTING.md")
PAGES += tuple(sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))

FENCE = re.compile(
    r"(?P<before>(?:^ *<!--.*?-->\n)*)^(?P<indent> *)(?P<ticks>`{3,})(?P<kind>[\w{}-]*).*\n"
    r"(?P<text>(?:.*\n)*?)^ *(?P=ticks) *$",
    re.MULTILINE,
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w])(?!\.\w)")


@dataclass
class Block:
    """One block of Python with its first line, the output that the page shows, and what it requires."""

    code: str
    line: int
    slow: bool = False
    requires: tuple[str, ...] = ()
    output: str | None = None


@dataclass
class Part:
    """Blocks of one page that share a namespace."""

    page: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def quick(self) -> list[Block]:
        return [block for block in self.blocks if not block.slow]

    @property
    def is_slow(self) -> bool:
        return any(block.slow for block in self.blocks)


class PageError(ValueError):
    """A page breaks the conventions of this file; the message names page and line."""


def read_parts(page: str, text: str) -> list[Part]:
    """The parts of ``page``; ``PageError`` on a comment or block that has no meaning here."""
    parts, slow, previous = [Part(page)], False, None
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("ticks")) + 1
        comments = re.findall(r"<!--\s*(.*?)\s*-->", fence["before"])
        words = [c.removeprefix("snippet:").split() for c in comments if c.startswith("snippet:")]
        if words and fence["kind"] != "python":
            raise PageError(f"{page}:{line}: a snippet comment before a block that is not python.")
        if "output" in comments:
            if fence["kind"] != "text" or previous is None:
                raise PageError(f"{page}:{line}: output without a python block before it.")
            previous.output = fence["text"]
        previous = None
        if fence["kind"] != "python":
            continue
        requires: tuple[str, ...] = ()
        for word, *rest in words:
            if word == "new" and not rest:
                parts.append(Part(page))
                slow = False
            elif word == "slow" and not rest:
                slow = True
            elif word == "requires" and rest and set(rest) <= EXTRAS.keys():
                requires = tuple(rest)
            else:
                raise PageError(f"{page}:{line}: unknown comment {[word, *rest]}.")
        indent = len(fence["indent"])
        code = "".join(row[indent:] or "\n" for row in fence["text"].splitlines(keepends=True))
        previous = Block(code, line, slow, requires)
        parts[-1].blocks.append(previous)
    return [part for part in parts if part.blocks]


def missing_extra(block: Block) -> str | None:
    """How to install what the block requires and this environment lacks."""
    absent = [name for name in block.requires if find_spec(name) is None]
    extras = ",".join(sorted({EXTRAS[name] for name in absent}))
    return f'{", ".join(absent)}: pip install "iql_torchrl[{extras}]"' if absent else None


def run_block(block: Block, page: str, namespace: dict[str, object], *, shorten: bool) -> str:
    """Run the block and return what it printed; errors name the lines of the page.

    ``shorten`` makes 20 updates where the page makes a thousand or more, and evaluates in 2 episodes
    where the page does in ten or more.
    """
    code = block.code
    if shorten:
        code = re.sub(r"updates=\d[\d_]{3,}", "updates=20", code)
        code = re.sub(r"\bepisodes=\d{2,}", "episodes=2", code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * block.line + code, page, "exec"), namespace)
    return printed.getvalue()


def differences(expected: str, printed: str, *, tolerance: float = 0.05) -> str | None:
    """What differs between the output on the page and the printed one; None if nothing does.

    ``...`` stands for any text, white space for any white space. A number may differ by ``tolerance``
    of itself and, if it has decimals, by half of its last one.
    """
    pattern, numbers = _pattern(expected)
    match = re.fullmatch(pattern, printed.strip(), re.DOTALL)
    if match is None:
        return f"the page shows\n{expected}\nand the block printed\n{printed}"
    for shown, value in zip(numbers, match.groups(), strict=True):
        decimals = re.search(r"\.(\d+)$", shown)
        last = 0.5 * 10.0 ** -len(decimals[1]) if decimals else 0.0
        if abs(float(value) - float(shown)) > max(tolerance * abs(float(shown)), last) + 1e-12:
            return f"the page shows {shown} and the block printed {value}, in\n{printed}"
    return None


def _pattern(expected: str) -> tuple[str, list[str]]:
    """A pattern with one group for each number of ``expected``, and these numbers."""
    pattern, numbers, place = "", [], 0
    text = expected.strip()
    for number in NUMBER.finditer(text):
        pattern += _literal(text[place : number.start()]) + r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
        numbers.append(number[0])
        place = number.end()
    return pattern + _literal(text[place:]), numbers


def _literal(text: str) -> str:
    words = re.split(r"(\.\.\.|\s+)", text)
    kinds = {"...": ".*?"}
    return "".join(r"\s+" if w.isspace() else kinds.get(w, re.escape(w)) for w in words if w)
