"""Strength of the tests: how many small faults, made one at a time in the package, they find.

    python benchmarks/find_faults.py --output found.json
    python benchmarks/find_faults.py --only update
    python benchmarks/find_faults.py --package ../old --faults old_faults.txt

``faults.txt`` says at its beginning how a fault is written. A fault is found when a test fails because
of it, or takes longer than the limit; tests that fail without any fault are left out. A fault is tried
with its own tests first. Those that these do not find are tried with the whole default suite: because
this takes many minutes, it runs once with all of them, and each test that fails then runs with one
of them at a time. The checkout stays as it is: faults are made in a temporary copy.

With ``--output`` the file is written after every fault. Started again with the same file, checkout and
tests, only what is missing is tried.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import machine, write

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", re.MULTILINE)
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".hypothesis", "__pycache__", ".*_cache")
NO_TESTS, WRONG_ARGUMENTS = 5, 4  # exit codes of pytest
ENTRY = re.compile(
    r"(?P<room>\w+): (?P<name>.+) \((?P<kind>.+)\)\n"
    r"(?P<description>(?: +.+\n)+?)"
    r" +file: (?P<file>\S+); tests: (?P<tests>.+)\n"
    r"(?P<old>(?:-.*\n)+)(?P<new>(?:\+.*\n)*)"
)


class FaultError(ValueError):
    """A fault that cannot be made, or tests that do not exist."""


@dataclass(frozen=True)
class Fault:
    """A block of ``faults.txt``: in ``file``, ``new`` takes the place of ``old``.

    ``tests``, below the folder of tests, are run first. ``description`` names no file, so that the same
    fault can be made after the code was rewritten.
    """

    name: str
    room: str
    kind: str
    description: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_faults(path: Path, only: Sequence[str] = ()) -> list[Fault]:
    """The faults of a file whose room or name is in ``only``; all where that is empty."""
    blocks = [block.strip("\n") for block in path.read_text().split("\n\n")]
    faults = [_fault(path, block) for block in blocks if block and not block.startswith("#")]
    names = [fault.name for fault in faults]
    if twice := {name for name in names if names.count(name) > 1}:
        raise FaultError(f"{path}: the names {sorted(twice)} occur more than once.")
    chosen = [fault for fault in faults if not only or {fault.room, fault.name} & set(only)]
    if not chosen:
        raise FaultError(
            f"{path}: no fault has the room or name {', '.join(only)}; "
            f"the rooms are {', '.join(sorted({fault.room for fault in faults}))}."
        )
    return chosen


def _fault(path: Path, block: str) -> Fault:
    entry = ENTRY.fullmatch(block + "\n")
    if entry is None:
        raise FaultError(
            f"{path}: {block!r} is not a fault; expected the lines 'room: name (kind)', an indented "
            "description, 'file: FILE; tests: FILE, ...', and old and new lines after - and +."
        )
    fields: dict[str, Any] = entry.groupdict()
    for side in ("old", "new"):
        fields[side] = "\n".join(line[1:] for line in fields[side].splitlines())
    fields["description"] = " ".join(fields["description"].split())
    fields["tests"] = tuple(re.split(", *", fields["tests"]))
    return Fault(**fields)


def check(faults: Sequence[Fault], checkout: Path, package: str) -> None:
    """Raise ``FaultError`` that lists all faults whose old text does not occur exactly once."""
    wrong = []
    for fault in faults:
        path = checkout / package / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else None
        if count != 1:
            places = "no such file" if count is None else f"{count} times"
            wrong.append(f"{fault.name}: {places} in {fault.file}")
        elif fault.old == fault.new:
            wrong.append(f"{fault.name}: changes nothing")
    if wrong:
        raise FaultError("texts that must occur once:\n  " + "\n  ".join(wrong))


class Copy:
    """A copy of a checkout in a temporary folder, in which faults are made and tests are run."""

    def __init__(self, checkout: Path, folder: Path, package: str) -> None:
        self.root = folder / "checkout"
        self.package = package
        shutil.copytree(checkout, self.root, ignore=LEFT_OUT)
        # files that some tests read: tests/conftest.py
        beside = checkout.resolve().parent / "shared"
        if beside.is_dir():
            (folder / "shared").symlink_to(beside)
        self._environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "1000",  # pytest shortens its summary to the width of the terminal
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "programs"),
        }
        self._environment.pop("PYTEST_ADDOPTS", None)
        self._process: subprocess.Popen[str] | None = None
        code = f"import {package}; print({package}.__file__)"
        how = {"cwd": self.root, "env": self._environment, "text": True}
        place = subprocess.check_output([sys.executable, "-c", code], **how).strip()
        if not Path(place).resolve().is_relative_to(self.root.resolve()):
            raise FaultError(f"{package} is imported from {place}, not from the copy.")

    @contextmanager
    def with_faults(self, *faults: Fault) -> Iterator[list[Fault]]:
        """Inside, the copy has the faults; those whose text another one has changed are left out."""
        before: dict[Path, str] = {}
        made = []
        try:
            for fault in faults:
                path = self.root / self.package / fault.file
                text = path.read_text()
                before.setdefault(path, text)
                if text.count(fault.old) == 1:
                    self._replace(path, text.replace(fault.old, fault.new))
                    made.append(fault)
            yield made
        finally:
            for path, text in before.items():
                self._replace(path, text)

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        path.write_text(text)
        # Python compares times in whole seconds, and may take an older text of the same length
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def failures(
        self, tests: Sequence[str], left_out: Sequence[str], limit: float, *, first: bool = True
    ) -> list[tuple[str, str]]:
        """Tests that fail, each with the first line of its error; the first one, or all.

        A run that takes longer than ``limit`` seconds is ended, and fails as "time limit".
        """
        places = [test if test.startswith("tests/") else f"tests/{test}" for test in tests]
        arguments = [*places, *(["-x"] if first else [])]
        arguments += [f"--deselect={test}" for test in left_out]
        self._process = process = subprocess.Popen(
            [sys.executable, *PYTEST, *arguments],
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return [("time limit", f"{limit:g} s")]
        if process.returncode == 0:
            return []
        if process.returncode in (NO_TESTS, WRONG_ARGUMENTS):
            raise FaultError(f"pytest ran nothing for {list(tests)}:\n{output[-1000:]}")
        listed = [(test, error or "") for test, error in FAILED.findall(output)]
        return listed or [(f"exit code {process.returncode}", output.strip().splitlines()[-1])]

    def stop(self) -> None:
        """End the tests that run now, with all processes that they started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


class Search:
    """Tries faults in a copy of the checkout, and writes the results to a file."""

    def __init__(self, faults: Sequence[Fault], options: argparse.Namespace) -> None:
        self.faults, self.options = faults, options
        self.output: Path | None = options.output
        self.began = time.monotonic()
        self.record: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(checkout=options.package),
            "checkout": digest_of(options.package, options.package_name),
            "fail_without_fault": [],
        }
        self.results: dict[str, dict[str, object]] = self._earlier()

    def _earlier(self) -> dict[str, dict[str, object]]:
        """Results in the output file of the same faults in the same checkout."""
        if self.output is None or not self.output.is_file():
            return {}
        earlier = json.loads(self.output.read_text())
        if earlier.get("checkout") != self.record["checkout"]:
            return {}
        self.record["fail_without_fault"] = earlier["fail_without_fault"]
        known = {fault.name: _plain(fault) for fault in self.faults}
        return {
            each["name"]: each
            for each in earlier["faults"]
            if known.get(each["name"]) == {key: each[key] for key in known.get(each["name"], {})}
        }

    def run(self) -> dict[str, dict[str, object]]:
        options = self.options
        with tempfile.TemporaryDirectory(prefix="faults") as folder:
            self.copy = Copy(options.package, Path(folder), options.package_name)
            try:
                self._try_first([f for f in self.faults if f.name not in self.results])
                if not options.first_tests_alone:
                    self._try_all([f for f in self.faults if self._left(f.name)])
            finally:
                self.copy.stop()
        return self.results

    def _left(self, name: str) -> bool:
        """Whether the first tests alone were tried, and did not find the fault."""
        return self.results[name]["tests_run"] == "first" and not self.results[name]["found"]

    def _try_first(self, faults: Sequence[Fault]) -> None:
        if faults:
            left_out = self._failing_anyway(list(dict.fromkeys(t for f in faults for t in f.tests)))
            for fault in faults:
                self._try(fault, None, left_out)

    def _try_all(self, faults: Sequence[Fault]) -> None:
        """The whole suite with all faults at once, then what failed with each of them alone."""
        if not faults:
            return
        left_out = self._failing_anyway(())
        while faults:
            with self.copy.with_faults(*faults) as made:
                failed = self.copy.failures((), left_out, self.options.suite_limit, first=False)
            tests = [test for test, _ in failed if test.startswith("tests/")]
            names = [test for test, _ in failed]
            self._say(f"{len(made)} faults at once: {len(failed)} tests fail {names}")
            for fault in made:
                if failed:  # without names of tests the suite could not run or end
                    self._try(fault, tests, left_out)
                else:
                    self._keep(fault, [], whole=True, seconds=0.0)
            faults = [fault for fault in faults if fault not in made]

    def _failing_anyway(self, tests: Sequence[str]) -> list[str]:
        """Tests that fail without any fault."""
        failed = self.copy.failures(tests, (), self.options.suite_limit, first=False)
        left_out = [test for test, _ in failed]
        self._say(f"without a fault: {len(left_out)} tests fail {left_out}")
        self.record["fail_without_fault"] = sorted({*self.record["fail_without_fault"], *left_out})
        return left_out

    def _try(self, fault: Fault, tests: Sequence[str] | None, left_out: Sequence[str]) -> None:
        """The fault alone with ``tests``, an empty list being the whole suite; None: with its own."""
        whole, began = tests is not None, time.monotonic()
        limit = self.options.suite_limit if whole else self.options.limit
        with self.copy.with_faults(fault):
            failed = self.copy.failures(fault.tests if tests is None else tests, left_out, limit)
        self._keep(fault, failed, whole=whole, seconds=time.monotonic() - began)

    def _keep(
        self, fault: Fault, failed: list[tuple[str, str]], *, whole: bool, seconds: float
    ) -> None:
        test, error = failed[0] if failed else (None, None)
        self.results[fault.name] = _plain(fault) | {
            "found": bool(failed),
            "by": test,
            "error": error and error[:300],
            "tests_run": "whole suite" if whole else "first",
            "seconds": round(seconds, 1),
        }
        self._say(f"{fault.room:12} {fault.name:36} {test or 'NOT FOUND'}")
        if self.output is not None:
            listed = [self.results[f.name] for f in self.faults if f.name in self.results]
            write(self.output, self.record | summary(listed) | {"faults": listed})

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.0f} s  {text}", flush=True)


def _plain(fault: Fault) -> dict[str, object]:
    return asdict(fault) | {"tests": list(fault.tests)}


def summary(results: Sequence[dict[str, object]]) -> dict[str, object]:
    """Numbers of faults, and of those that were found, in all and by room."""
    rooms: dict[str, list[int]] = {}
    for each in results:
        counts = rooms.setdefault(str(each["room"]), [0, 0])
        counts[0] += bool(each["found"])
        counts[1] += 1
    number_found = sum(count for count, _ in rooms.values())
    return {"found": number_found, "of": len(results), "rooms": rooms}


def digest_of(checkout: Path, package: str) -> str:
    """Of all Python files of package and tests."""
    content = hashlib.sha256()
    for folder in (package, "tests"):
        for path in sorted((checkout / folder).rglob("*.py")):
            content.update(str(path.relative_to(checkout)).encode())
            content.update(path.read_bytes())
    return content.hexdigest()[:16]


def table(results: Sequence[dict[str, object]]) -> str:
    counts = summary(results)
    rooms: dict[str, list[int]] = counts["rooms"]  # type: ignore[assignment]
    lines = ["| room | found | of |", "|---|---:|---:|"]
    lines += [f"| {room} | {found} | {count} |" for room, (found, count) in rooms.items()]
    lines.append(f"| all | {counts['found']} | {counts['of']} |")
    lines += [f"not found: {e['name']} ({e['description']})" for e in results if not e["found"]]
    later = [e["name"] for e in results if e["found"] and e["tests_run"] != "first"]
    return "\n".join([*lines, *(f"found by the whole suite alone: {name}" for name in later)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--package", type=Path, default=ROOT, metavar="DIR", help="a checkout; this one by default")
    add("--package-name", default="iql_torchrl", help="name of the package in it")
    add("--faults", type=Path, default=ROOT / "benchmarks" / "faults.txt", metavar="FILE")
    add("--only", default="", metavar="ROOM,...", help="rooms or names of faults")
    add("--output", type=Path, default=None, metavar="FILE.json")
    add("--limit", type=float, default=600, help="seconds that the first tests of a fault may take")
    add("--suite-limit", type=float, default=5400, help="seconds that the whole suite may take")
    add("--first-tests-alone", action="store_true", help="never run the whole suite")
    add("--check", action="store_true", help="only check that every fault can be made")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    options = parse(arguments)
    options.package = options.package.resolve()
    only = [word for word in options.only.split(",") if word]
    faults = read_faults(options.faults, only)
    check(faults, options.package, options.package_name)
    print(f"{len(faults)} faults, and each text occurs once.", flush=True)
    if options.check:
        return []
    results = Search(faults, options).run()
    listed = [results[fault.name] for fault in faults]
    print(table(listed))
    return listed


if __name__ == "__main__":
    main()
