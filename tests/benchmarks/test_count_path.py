"""``benchmarks/count_path.py``: files that a call passes, by hand and of an agent."""

from __future__ import annotations

import sys
from pathlib import Path

import count_path

import iql_torchrl

PACKAGE = Path(iql_torchrl.__file__).parent


def test_only_called_functions_of_the_package_count(tmp_path):
    sources = {
        "__init__.py": "def of_init(): pass\n",
        "called.py": "class A:\n    def method(self):\n        return [x for x in range(3)]\n",
        "idle.py": "def idle(): pass\n",
    }
    functions = {"range": range}
    for name, text in sources.items():
        exec(compile(text, str(tmp_path / name), "exec"), functions)  # what an import does

    def call():
        functions["of_init"]()
        functions["A"]().method()

    with count_path.Calls(tmp_path) as calls:
        call()
    functions["idle"]()
    assert list(calls.of_file) == [tmp_path / "called.py"]
    assert sys.getprofile() is None


def test_an_agent_and_its_update(tmp_path):
    made = count_path.cases(tmp_path)
    passed = {}
    for name in ("make_agent", "eager update", "first eager update"):
        call = made[name]()
        with count_path.Calls(PACKAGE) as calls:
            call()
        passed[name] = {str(path.relative_to(PACKAGE)) for path in calls.of_file}
    assert {"agent/build.py", "config/iql_config.py"} <= passed["make_agent"]
    assert {"update/step.py", "functional.py"} <= passed["eager update"]
    assert passed["eager update"] <= passed["first eager update"]
    assert "config/iql_config.py" not in passed["first eager update"]
