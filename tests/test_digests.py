"""Digests of what a run was made with."""

import dataclasses
import json

from retrograd import Classification
from retrograd.trajectory import digests


def test_tasks_in_tasks_are_told_apart():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        base: object

    class Plain:
        pass

    bases = (Classification("margin"), Classification("loss"), Plain(), Plain())
    described = [digests._describe(Outer(base)) for base in bases]
    assert described[0]["options"]["base"]["options"]["measurement"] == "margin"
    assert described[0] != described[1] != described[2] == described[3]
    assert json.loads(json.dumps(described)) == described
