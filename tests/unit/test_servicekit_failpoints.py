"""Faults on demand: only where allowed, once, at the k-th visit."""

from __future__ import annotations

import pytest

from servicekit.failpoints import Failpoints, parse


def test_failpoints_are_refused_without_the_variable() -> None:
    with pytest.raises(ValueError, match="BATON_ALLOW_FAILPOINTS=1"):
        parse(("kill-after-token=1",), {})
    assert not parse((), {}).active


@pytest.mark.parametrize("setting", ["kill-after-lunch=1", "kill-after-token", "kill-after-token=0"])
def test_a_wrong_setting_is_named(setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        parse((setting,), {"BATON_ALLOW_FAILPOINTS": "1"})


def test_a_point_acts_once_at_its_kth_visit() -> None:
    points = parse(("corrupt-published-block=3",), {"BATON_ALLOW_FAILPOINTS": "1"})
    assert [points.due("corrupt-published-block") for _ in range(5)] == [False, False, True, False, False]
    assert not points.due("kill-after-token")


def test_visits_in_bulk_do_not_step_over_the_point() -> None:
    points = Failpoints({"kill-after-token": 3})
    assert not points.due("kill-after-token", 2)
    assert points.due("kill-after-token", 2)
