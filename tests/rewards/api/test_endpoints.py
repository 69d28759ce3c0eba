"""Which address is tried first."""

from __future__ import annotations

from trl_grpo_ext.rewards.api.endpoints import REST_S, Endpoints


def test_address_that_did_not_answer_is_tried_last_for_a_while() -> None:
    clock = [100.0]
    endpoints = Endpoints(["a", "b", "c"], now=lambda: clock[0])
    assert endpoints.in_order() == ["a", "b", "c"]
    endpoints.rest("a")
    assert endpoints.in_order() == ["b", "c", "a"]
    clock[0] += REST_S - 1
    endpoints.rest("b")
    assert endpoints.in_order() == ["c", "a", "b"]
    clock[0] += 1
    assert endpoints.in_order() == ["a", "c", "b"]
