"""Links, files and pictures of the Markdown pages exist; the site builds; the main page is short."""

import ast
import re
import struct
import subprocess
import sys

import pytest
from extras import needs
from snippets import PAGES, ROOT, read_parts

DOCS = ROOT / "docs"
SITE = [page for page in PAGES if page.startswith("docs/")]
PICTURES = sorted((DOCS / "pictures").glob("*.png"))
LINK = re.compile(r"\]\(((?!http|mailto:)[^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"^ *(`{3,}|:{3,})(?!\{)[^\n]*\n.*?^ *\1 *$", "", text, flags=re.M | re.S)


def sections(text: str) -> list[str]:
    """The names by which links reach the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)", without_code(text), flags=re.MULTILINE)
    labels = re.findall(r"^\((\S+)\)=$", text, flags=re.MULTILINE)
    return labels + [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_sections_it_names_exist(page):
    path = ROOT / page
    text = path.read_text()
    named = r"`((?:examples|tests|benchmarks|docs|iql_torchrl)/[\w./-]+)(?:::\w+)?`"
    for name in re.findall(named, text):
        assert (ROOT / name).exists(), f"{page} names {name}"
    for link in LINK.findall(without_code(text)):
        name, _, section = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), f"{page} links to {link}"
        if page.startswith("docs/"):
            inside = DOCS in target.resolve().parents or target.suffix == ".png"
            assert inside, f"{page} links to {link}, which is not on the site; name it as `{name}`"
        if section and target.suffix == ".md":
            names = sections(target.read_text())
            assert section in names, f"{page} links to {link}; the sections are {names}"


def test_every_page_is_in_the_index():
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(p.stem for p in DOCS.glob("*.md") if p.stem != "index")


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_fits_into_a_column(path):
    width, _ = struct.unpack(">II", path.read_bytes()[16:24])
    assert 640 <= width <= 900
    assert path.stat().st_size < 150_000
    pages = [page for page in PAGES if path.name in (ROOT / page).read_text()]
    assert pages, f"no page shows {path.name}"
    scripts = list(path.parent.glob("*.py"))
    named = any(path.stem in script.read_text() for script in scripts)
    assert named or any(path.stem.startswith(f"{script.stem}_") for script in scripts), "no script"


def test_first_block_of_the_main_page_is_at_most_ten_lines_of_code():
    first = read_parts("README.md", (ROOT / "README.md").read_text())[0].blocks[0]
    assert len([line for line in first.code.splitlines() if line.strip()]) <= 10


def test_the_main_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_inserted_code_exists():
    """Each ``literalinclude`` names a function or class of a file: Sphinx alone would notice."""
    text = (DOCS / "algorithm.md").read_text()
    inserted = re.findall(r"{literalinclude} (\S+)\n:language: python\n:pyobject: (\S+)", text)
    assert len(inserted) == text.count("{literalinclude}")
    for name, path in inserted:
        body: list[ast.stmt] = ast.parse((DOCS / name).read_text()).body
        for part in path.split("."):
            found = [n for n in body if getattr(n, "name", None) == part]
            assert found, f"{name} has no {path}"
            body = found[0].body  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    needs("sphinx")
    needs("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", tmp_path / "trees"]
    subprocess.run([*command, "docs", tmp_path / "html"], cwd=ROOT, check=True, timeout=600)
    text = (tmp_path / "html" / "index.html").read_text()
    for page in SITE:
        assert page.removeprefix("docs/").replace(".md", ".html") in text or "index" in page


@pytest.mark.parametrize("page", SITE)
def test_its_formulas_can_be_drawn(page):
    """matplotlib's commands differ from LaTeX's in a few names."""
    sys.path.append(str(DOCS))
    from formulas import svg

    text = without_code((ROOT / page).read_text())
    found = re.findall(r"\$\$(.+?)\$\$", text, flags=re.DOTALL)
    found += re.findall(r"(?<![\\$`])\$([^$\n]+)\$(?!\$)", text)
    for formula in found:
        drawn = svg(formula)
        width, height = (float(x) for x in re.findall(r"(?:width|height):([\d.]+)em", drawn))
        assert 0 < width < 45
        assert 0 < height < 6
        assert "nan" not in drawn
