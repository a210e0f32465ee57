"""``minari_tutorial.py``: changes of the tutorial's text, and its execution."""

from __future__ import annotations

import pytest
from extras import needs

needs("gymnasium_robotics")
import minari_tutorial  # noqa: E402


def test_changes_must_find_their_text():
    assert minari_tutorial.changed("a b", [("why", "a", "c"), ("why", "b", "d")]) == "c d"
    with pytest.raises(SystemExit, match=r"does not contain 'x' \(why\).*another version"):
        minari_tutorial.changed("a b", [("why", "x", "y")])


def test_a_script_gives_its_names_or_its_error(tmp_path):
    names = minari_tutorial.execute("value = 1\nprint('quiet')", tmp_path)
    assert names["value"] == 1
    assert minari_tutorial.execute("1 / 0", tmp_path) == {
        "error": "ZeroDivisionError: division by zero"
    }


def test_errors_are_listed_until_no_change_is_left(tmp_path, monkeypatch):
    changes = [("one", "a = 1 / 0\n", ""), ("one", "b = 2\n", ""), ("two", "c = absent\n", "")]
    monkeypatch.setattr(minari_tutorial, "CHANGES", changes)
    errors = minari_tutorial.as_written("a = 1 / 0\nb = 2\nc = absent\n", tmp_path)
    assert [each["error"].partition(":")[0] for each in errors] == [
        "ZeroDivisionError",
        "NameError",
    ]
    assert [each["changes"] for each in errors] == ["0", "2"]
