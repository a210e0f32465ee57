"""The words of the package and its pages are those of the field, not private ones.

Each pattern has its exceptions: files that use the word in another meaning.
"""

import re
from pathlib import Path

import pytest
from snippets import ROOT

#: What is not written, what is written in its place, and files where the word means something else.
WORDS = {
    r"\b(?:the|a|this|one) logs?\b(?![-.]\w)(?! of| is| file| line)|\blog's\b": ("dataset", ()),
    r"\bmarks of (?:the )?ends?\b": ("done flags", ()),
    r"\breward maps?\b": ("reward scaling", ()),
    r"\bknobs?\b": ("setting", ()),
    r"\bwhole numbers?\b": ("integer", ("benchmarks/bench_boundaries.py",)),  # of an older version
    r"\b(?:live|detached) critics?\b": ("online critics", ()),
    r"\bceilings?\b": ("clip", ()),
    r"\bmotions?\b": ("discontinuity", ()),
    r"\b(?:says|say|where|wrong|shifted|missing) marks\b": ("done flags", ()),
    r"\bthe clone\b|\b(?:plain|a) clone\b(?! of|\|)": ("behaviour cloning (BC) baseline", ()),
    r"\b(?:all|the|its|their|usual|higher|lower|TorchRL's) rates\b(?! of| are)": (
        "learning rates", ("benchmarks/bench_goal_maze.py",),
    ),
    r"\bwhere there is (?:one|none)\b|\bof choice\b|\bfor itself\b": ("if any, that you pass", ()),
    r"(?<!there )(?<!There )\bis no (?!longer|more|less|sing)\w": ("is not a", ()),
    r"\bsick\b": ("failing", ()),
    r"\bdoubts?\b": ("caveat", ()),
    r"\b(?:rank_members|open_ended|made_actions|settle_products|put_into_networks|mean_of_all)\b": (
        "rank_policies, never_terminated, valid_action_mask, ...", (),
    ),
    r"\b(?:largest_of_all|coming_rates|packed_call|whole_file|leads_below|surroundings|crew)\b": (
        "all_reduce_max, upcoming_lrs, serialize_call, atomic_write, ...", (),
    ),
    r"\b(?:perform|judge|aside)\(": ("run_task, promote_or_delete, pending_checkpoint", ()),
    r"\bis none of\b|\bthat is none\b": ("is not one of", ()),
}  # fmt: skip
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("iql_torchrl", "docs", "examples", "benchmarks", "tests", "")
    for path in (ROOT / folder).glob("**/*" if folder in ("iql_torchrl", "tests") else "*")
    if path.suffix in (".py", ".md", ".ipynb") and path.name != Path(__file__).name
    if path.parent.name != "selection"  # which is being rewritten
)


def found(pattern: str) -> list[str]:
    """Each place in which the pattern occurs, its exceptions left out."""
    places = []
    for name in FILES:
        if not name.startswith(WORDS[pattern][1]):
            lines = (ROOT / name).read_text().splitlines()
            places += [f"{name}:{n}: {x}" for n, x in enumerate(lines, 1) if re.search(pattern, x)]
    return places


@pytest.mark.parametrize("pattern", WORDS)
def test_private_words_are_not_used(pattern):
    places = found(pattern)
    word = WORDS[pattern][0]
    assert not places, f"{len(places)} lines; write {word!r}:\n" + "\n".join(places[:20])


@pytest.mark.parametrize("pattern", WORDS)
def test_exceptions_are_needed(pattern):
    """An exception of a file that no longer has the word is to be removed."""
    for exception in WORDS[pattern][1]:
        texts = [(ROOT / name).read_text() for name in FILES if name.startswith(exception)]
        assert any(re.search(pattern, text) for text in texts), exception
