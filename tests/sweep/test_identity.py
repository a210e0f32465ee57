"""The text that identifies functions and objects of a sweep."""

from __future__ import annotations

from functools import partial

from iql_torchrl.sweep.identity import _word


def score(agent, weight=1.0):
    return weight


class Scorer:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, agent):
        return self.weight


def test_functions_with_other_arguments_or_code_differ():
    words = [
        _word(score),
        _word(partial(score, weight=1.0)),
        _word(partial(score, weight=2.0)),
        _word(lambda agent: 1.0),
        _word(lambda agent: 2.0),
        _word(Scorer(1.0)),
        _word(Scorer(2.0)),
    ]
    assert len(set(words)) == len(words)
    assert _word(partial(score, weight=2.0)) == words[2]
    assert _word(Scorer(2.0)) == words[-1]
    assert words[0] == "score"
