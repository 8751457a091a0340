"""Whose id is shown to whom."""

from __future__ import annotations

import pytest

from pilotlight.gateway.request_ids import client_id, for_engine, shown

OURS = "00112233445566778899aabbccddeeff"


@pytest.mark.parametrize(
    "sane",
    ["a", "9b2f1c1e-7a3d-4f50-8f0e-2d3c4b5a6978", "01J8Z3N4.req_7:retry=2", "Zm9v+/==", "me@host", "x" * 128],
)
def test_a_sane_id_is_the_clients(sane):
    assert client_id(sane.encode()) == sane
    assert shown(OURS, sane) == sane
    assert for_engine(OURS, sane) == f"{sane}-{OURS}"


@pytest.mark.parametrize(
    "odd",
    [b"", b" ", b"a b", b"x" * 129, b"a\nb", b"a\n", "ä".encode(), b"\xff", b'a"b', b"a,b", b"<b>", b"a\x00"],
)
def test_an_id_that_is_not_is_none(odd):
    assert client_id(odd) == ""
    assert shown(OURS, "") == for_engine(OURS, "") == OURS
