"""The text that identifies functions and objects of a sweep."""

from __future__ import annotations

from functools import partial

from iql_torchrl.sweep.sweep import text_of


def score(agent, weight=1.0):
    return weight


class Scorer:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, agent):
        return self.weight


def test_functions_with_other_arguments_or_code_differ():
    words = [
        text_of(score),
        text_of(partial(score, weight=1.0)),
        text_of(partial(score, weight=2.0)),
        text_of(lambda agent: 1.0),
        text_of(lambda agent: 2.0),
        text_of(Scorer(1.0)),
        text_of(Scorer(2.0)),
    ]
    assert len(set(words)) == len(words)
    assert text_of(partial(score, weight=2.0)) == words[2]
    assert text_of(Scorer(2.0)) == words[-1]
    assert words[0] == "score"
