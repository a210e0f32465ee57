"""The Python blocks of the Markdown pages run as printed and print what the pages show."""

import os
import shutil

import pytest
from snippets import PAGES, ROOT, PageError, differences, missing_extra, read_parts, run_block

from iql_torchrl.data.builtin import make_dataset

PARTS = [
    pytest.param(part, id=f"{page}-{number}")
    for page in PAGES
    for number, part in enumerate(read_parts(page, (ROOT / page).read_text()))
]


@pytest.fixture(scope="session")
def pendulum_log(tmp_path_factory):
    """The Minari folder with the whole Pendulum log, made once."""
    folder = tmp_path_factory.mktemp("pendulum")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    make_dataset("pendulum/mixed-v0", progress=False)
    os.environ.pop("MINARI_DATASETS_PATH")
    if before is not None:
        os.environ["MINARI_DATASETS_PATH"] = before
    return folder


def run_part(part, blocks, *, shorten):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if missing := missing_extra(block):
            pytest.skip(missing)
        printed = run_block(block, part.page, namespace, shorten=shorten)
        if block.output is not None:
            wrong = differences(block.output, printed)
            assert wrong is None, f"{part.page}:{block.line}: {wrong}"


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("part", [p for p in PARTS if p.values[0].quick])
def test_blocks_run(part, empty_folder, request):
    """With fewer updates and a shorter Pendulum log, unless the page shows what the blocks print."""
    whole = any(block.output is not None for block in part.quick)
    if "pendulum/mixed-v0" in "".join(block.code for block in part.quick):
        if whole:
            dataset = request.getfixturevalue("pendulum_log")
            shutil.copytree(dataset, empty_folder / "minari", dirs_exist_ok=True)
        else:
            make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    run_part(part, part.quick, shorten=not whole)


@pytest.mark.slow
@pytest.mark.parametrize("part", [p for p in PARTS if p.values[0].is_slow])
def test_slow_blocks_run_as_printed(part, empty_folder):
    run_part(part, part.blocks, shorten=False)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_every_block_of_python_is_run(page):
    """A block of ``py`` is code of another library, which only the page about these may show."""
    text = (ROOT / page).read_text()
    others = () if page == "docs/coming_from.md" else ("py",)
    for kind in (*others, "py3", "python3", "pycon", "ipython"):
        assert f"```{kind}\n" not in text, f"{page}: write ```python, which the tests run"


# -- the runner itself

PAGE = """# Page

```python
a = 1
```

- In a list:

  ```python
  print(a + 1, "and", 0.5, "mixed-v0")
  ```

  <!-- output -->
  ```text
  2 and 0.5 ...-v0
  ```

<!-- snippet: slow -->
```python
b = 2
```

<!-- snippet: new -->
<!-- snippet: requires onnxruntime -->
```python
c = 3
```
"""


def test_a_page_is_read_in_parts():
    first, second = read_parts("page.md", PAGE)
    assert [block.code for block in first.quick] == [
        "a = 1\n",
        'print(a + 1, "and", 0.5, "mixed-v0")\n',
    ]
    assert first.is_slow
    assert [block.line for block in first.blocks] == [3, 9, 19]
    assert first.blocks[1].output.strip() == "2 and 0.5 ...-v0"
    assert second.blocks[0].requires == ("onnxruntime",)
    assert not second.is_slow
    run_part(first, first.blocks, shorten=False)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- snippet: skip -->\n```python\n```\n", "unknown comment"),
        ("<!-- snippet: requires jax -->\n```python\n```\n", "unknown comment"),
        ("<!-- snippet: slow -->\n```bash\n```\n", "not python"),
        ("<!-- output -->\n```text\n```\n", "output without"),
    ],
)
def test_a_page_with_another_comment_is_refused(page, message):
    with pytest.raises(PageError, match=message):
        read_parts("page.md", page)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("return -155.2", "return  -150.0\n", True),
        ("return -155.2", "return -140.0", False),
        ("3 rows", "4 rows", False),
        ("0.00", "0.004", True),
        ("0.00", "0.006", False),
        ("a ... z 1e-3", "a b\nc z 0.00101", True),
        ("a ... z", "a b\nc", False),
        ("torch.Size([5, 1])", "torch.Size([5, 1])", True),
        ("mixed-v0", "mixed-v1", False),
        ("1,000 rows", "1,000 rows", True),
    ],
)
def test_outputs_are_compared(expected, printed, same):
    assert (differences(expected, printed) is None) is same


def test_errors_name_the_line_of_the_page():
    (part,) = read_parts("page.md", "# Page\n\n```python\na = 1\nb = 1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_part(part, part.blocks, shorten=False)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == ("page.md", 5)
