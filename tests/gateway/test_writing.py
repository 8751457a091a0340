"""Writes of one turn of the event loop, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from pilotlight.gateway.writing import outbox_of, write_now


@contextlib.asynccontextmanager
async def connection():
    """Our end as a transport, and the other end as a socket that never waits."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    try:
        yield transport, transport.get_extra_info("socket").fileno(), theirs
    finally:
        transport.abort()
        theirs.close()


def received(theirs):
    """What has come; None for nothing yet."""
    try:
        return theirs.recv(1 << 20)
    except BlockingIOError:
        return None


async def test_what_a_turn_writes_goes_out_at_its_end_in_order():
    outbox = outbox_of(asyncio.get_running_loop())
    async with connection() as (one, one_fd, at_one), connection() as (two, two_fd, at_two):
        outbox.write(one, one_fd, b"a")
        outbox.write(two, two_fd, b"x")
        outbox.write(one, one_fd, b"b")
        assert (received(at_one), received(at_two)) == (None, None)
        await asyncio.sleep(0)
        assert (received(at_one), received(at_two)) == (b"ab", b"x")
        await asyncio.sleep(0)
        assert received(at_one) is None


async def test_what_is_written_now_or_closed_comes_after_what_waits():
    outbox = outbox_of(asyncio.get_running_loop())
    async with connection() as (transport, fd, theirs), connection() as (other, other_fd, elsewhere):
        outbox.write(transport, fd, b"a")
        outbox.write(other, other_fd, b"x")
        outbox.flush(transport)
        write_now(transport, fd, b"b")
        assert (received(theirs), received(elsewhere)) == (b"ab", None)
        outbox.write(transport, fd, b"c")
        outbox.flush(transport)
        transport.close()
        await asyncio.sleep(0)
        assert (received(theirs), received(elsewhere)) == (b"c", b"x")


@pytest.mark.parametrize("size", [1, 4_000_000])
async def test_whoever_cannot_be_written_to_harms_nobody_else(size):
    """One connection is closed meanwhile, one has a peer that is gone, one is full; the last gets all of it."""
    outbox = outbox_of(asyncio.get_running_loop())
    async with connection() as gone, connection() as closed, connection() as well:
        for transport, fd, _ in (gone, closed, well):
            outbox.write(transport, fd, b"a" * size)
        gone[2].close()
        closed[0].abort()
        got = 0
        while got < size:
            await asyncio.sleep(0)
            got += len(received(well[2]) or b"")
        assert got == size


async def test_an_outbox_that_is_empty_flushes_nothing():
    outbox = outbox_of(asyncio.get_running_loop())
    async with connection() as (transport, _, theirs):
        outbox.flush(transport)
        await asyncio.sleep(0)
        assert received(theirs) is None


def test_every_loop_has_its_own():
    async def own():
        return outbox_of(asyncio.get_running_loop())

    assert asyncio.run(own()) is not asyncio.run(own())
