"""``benchmarks/find_faults.py`` on a small package with faults that its tests find or do not find."""

from __future__ import annotations

import json
from pathlib import Path

import find_faults
import pytest
from find_faults import FaultError

CODE = """
def add(a, b):
    return a + b


def half(a):
    return a / 2
"""
FIRST = """
from small import add


def test_it():
    assert add(2, 3) == 5


def test_that_always_fails():
    assert False, "not because of a fault"
"""
OTHER = """
import pytest
from small import half


@pytest.mark.parametrize("value", [0, 3])
def test_half(value):
    assert half(value) * 2 == value
"""


FAULTS = """# A comment.

code: found at once (sign)
    The difference in place
    of the sum.
    file: code.py; tests: test_first.py
-def add(a, b):
-    return a + b
+def add(a, b):
+    return a - b

code: found later (bound)
    Halves are whole.
    file: code.py; tests: test_first.py
-return a / 2
+return a // 2

other: not found: an equal (form) (no fault)
    The same.
    file: code.py; tests: test_first.py
-return a / 2
+return a * 0.5
"""
SUM = FAULTS.split("\n\n")[1]


@pytest.fixture
def arguments(tmp_path):
    """A checkout with a package, two files of tests and three faults; options that name them."""
    checkout = tmp_path / "checkout"
    for path, text in {
        "small/__init__.py": "from small.code import add, half",
        "small/code.py": CODE,
        "tests/test_first.py": FIRST,
        "tests/test_other.py": OTHER,
        "pytest.ini": "[pytest]\ntestpaths = tests\n",
    }.items():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text(text)
    listed = tmp_path / "faults.txt"
    listed.write_text(FAULTS)
    return [f"--package={checkout}", "--package-name=small", f"--faults={listed}"]


def test_each_fault_is_found_by_what_fails_because_of_it(arguments, tmp_path, capsys):
    output = tmp_path / "found.json"
    results = find_faults.main([*arguments, f"--output={output}"])
    assert [(e["found"], e["by"], e["tests_run"]) for e in results] == [
        (True, "tests/test_first.py::test_it", "first"),
        (True, "tests/test_other.py::test_half[3]", "whole suite"),
        (False, None, "whole suite"),
    ]
    record = json.loads(output.read_text())
    assert record["faults"] == results
    assert (record["found"], record["of"]) == (2, 3)
    assert record["rooms"] == {"code": [2, 2], "other": [0, 1]}
    assert record["fail_without_fault"] == ["tests/test_first.py::test_that_always_fails"]
    assert (tmp_path / "checkout/small/code.py").read_text() == CODE  # it was not modified
    printed = capsys.readouterr().out
    assert "| all | 2 | 3 |" in printed
    assert "not found: not found: an equal (form) (The same.)" in printed
    assert "found by the whole suite alone: found later" in printed
    # what is in the file is not tried again
    assert find_faults.main([*arguments, f"--output={output}"]) == results
    assert "without fault" not in capsys.readouterr().out


def write(arguments, text):
    Path(arguments[2].partition("=")[2]).write_text(text)


def test_a_run_that_does_not_end_is_ended(arguments):
    write(arguments, SUM.replace("return a - b", "while True: pass"))
    (result,) = find_faults.main([*arguments, "--limit=3"])
    assert (result["found"], result["by"]) == (True, "time limit")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-def add(a, b):\n-    return a + b", "-    return a", "2 times in code.py"),
        ("-    return a + b", "-nowhere", "0 times in code.py"),
        ("file: code.py", "file: none.py", "no such file in none.py"),
        ("return a - b", "return a + b", "changes nothing"),
        ("test_first.py", "test_none.py", "pytest ran nothing"),
        ("code: found", "code found", "is not a fault; expected the lines"),
        ("; tests: test_first.py", "", "is not a fault; expected the lines"),
    ],
)
def test_faults_that_cannot_be_made_are_named(arguments, old, new, message):
    assert old in SUM
    write(arguments, SUM.replace(old, new))
    with pytest.raises(FaultError, match=message):
        find_faults.main(arguments)


def test_what_a_block_says(tmp_path):
    listed = tmp_path / "faults.txt"
    listed.write_text(
        SUM.replace("+def add(a, b):\n+    return a - b", "").replace("first.py", "a, b")
    )
    assert find_faults.read_faults(listed) == [
        find_faults.Fault(
            name="found at once",
            room="code",
            kind="sign",
            description="The difference in place of the sum.",
            file="code.py",
            old="def add(a, b):\n    return a + b",
            new="",
            tests=("test_a", "b"),
        )
    ]


def test_names_and_rooms_choose(arguments):
    listed = Path(arguments[2].partition("=")[2])
    third = "not found: an equal (form)"
    assert [f.name for f in find_faults.read_faults(listed, ["other"])] == [third]
    assert [f.name for f in find_faults.read_faults(listed, ["found later"])] == ["found later"]
    with pytest.raises(FaultError, match="the rooms are code, other"):
        find_faults.read_faults(listed, ["none"])
    listed.write_text(f"{SUM}\n\n{SUM}")
    with pytest.raises(FaultError, match="more than once"):
        find_faults.read_faults(listed)


def test_the_packages_own_list_can_be_made_and_names_tests_that_exist():
    faults = find_faults.read_faults(find_faults.ROOT / "benchmarks" / "faults.txt")
    find_faults.check(faults, find_faults.ROOT, "iql_torchrl")
    for each in faults:
        named = [find_faults.ROOT / "tests" / t.partition("::")[0] for t in each.tests]
        assert all(path.is_file() for path in named), each
