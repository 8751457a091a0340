"""Answers of a take as the worker program reads them: each job alone (worker-protocol.md §3.1, §3.2)."""

from __future__ import annotations

import pytest

from pilotlight.worker.platform import TakenJob, read_jobs

GOOD = b'{"id": "good", "input": {"n": 1}}'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"\\ud800x"', "\ufffdx"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b"1e999", float("inf")),
        (b"1" * 100, int("1" * 100)),
        (b'"\xff"', "\ufffd"),
    ],
)
def test_values_that_the_strict_reader_refuses(text, value):
    jobs = read_jobs(b'[{"id": "odd", "input": ' + text + b"}, " + GOOD + b"]")
    assert jobs == [
        TakenJob("odd", {"id": "odd", "input": value}),
        TakenJob("good", {"id": "good", "input": {"n": 1}}),
    ]


def test_unreadable_job_is_named_and_does_no_harm():
    odd, good = read_jobs(b'[{"id": "odd", "input": ' + b"1" * 5000 + b"}, " + GOOD + b"]")
    assert (odd.id, odd.payload) == ("odd", {})
    assert odd.unreadable.startswith("the job cannot be read: Exceeds the limit")
    assert (good.id, good.unreadable) == ("good", None)


def test_single_job_and_what_is_none():
    assert read_jobs(GOOD)[0].id == "good"
    assert read_jobs(b'[1, {"id": ""}, {"id": 5}, null]') == ["int", "dict", "dict", "NoneType"]
    assert read_jobs(b"[") == read_jobs(b"") == ["unreadable"]
