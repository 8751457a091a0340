"""Whose request is next, when keys share an endpoint and not all of their requests fit.

Fair sharing by cost, after the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024). Every key has an account: what it was served so far, and what its requests under way are
expected to cost, both divided by the key's share. The next slot goes to the waiting key with the smallest
account. Differences to the paper: the account is charged with the expected cost at once and put right at the
end, so that requests under way count before they have produced anything; and what is expected is learned per
key, from what its requests cost of what they had announced.

Rest gives little credit, R: a key that begins to wait, or is served at once, is lifted to R below what the
key had been served that got a slot last. So one that asks for less than its share may ask for a few requests
in a row and still comes before one that asks for all it can get. Nor does use leave a debt: who had an
endpoint for itself lifts those who come.

With k slots and requests that cost C at most, let B = (2 (k + 1) C + R) (1/s + 1/s') for keys with the shares
s and s' (tests/core/test_fair_queue.py). While both have requests waiting, what they are served relative to
their shares differs by at most B; and B is all that one is served, relative to its share, while one request
of the other waits.

The structure is deterministic and knows no clock. `gateway.slots` has one for each endpoint.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_UNITS = 16
"""Units per token at a share of one. The shares of priorities, 1, 4 and 16, divide it: nothing is rounded."""

CREDIT = 1024
"""Tokens that a key may save up by asking for less than its share: some short answers. With none, a light key
waited half a request longer beside a greedy one whenever two of its requests came close together."""

_COMPLETION_WEIGHT = 2
"""A completion token costs twice a prompt token (as in the paper's evaluation, after OpenAI's prices)."""

_COMPLETION_TOKENS_GUESSED = 256
"""Expected of a request that does not say; only the first requests of a key depend on it."""

_COMPLETION_TOKENS_MAX = 4096
"""More is not believed of a request: most ask for the room that the context leaves and use little of it."""

_BYTES_PER_TOKEN = 4
"""Of English text in JSON, about."""

_LEARNED_START = 256
_LEARNED_MAX = 65_536
"""Costs that an expectation is learned from: it begins with this many as they were announced, and halves its
memory when it is full."""

_ACCOUNTS_MIN = 256
"""Accounts of keys that rest are dropped when there are twice as many as were left the last time."""


def cost_of(tokens_in: int, tokens_out: int) -> int:
    """What a request has cost, in prompt tokens.

    Args:
        tokens_in: Of its prompt.
        tokens_out: Of its completion.
    """
    return tokens_in + _COMPLETION_WEIGHT * tokens_out


def expected_tokens(body_bytes: int, tokens_out_max: int | None) -> tuple[int, int]:
    """Tokens that a request is expected to need, of its prompt and of its completion.

    Args:
        body_bytes: Size of its body.
        tokens_out_max: Most tokens it may produce (`max_tokens`), as the client wrote it; None if it does not
            say. Nobody gains by a number below 0.
    """
    tokens_out = _COMPLETION_TOKENS_GUESSED if tokens_out_max is None else tokens_out_max
    return body_bytes // _BYTES_PER_TOKEN + 1, max(0, min(tokens_out, _COMPLETION_TOKENS_MAX))


class _Account(Generic[T]):
    """One key's. `settled` and `pending` are units; `at` is its place among the waiting keys."""

    __slots__ = ("announced", "at", "cost", "key", "pending", "places", "settled", "share")

    def __init__(self, key: str, share: int, settled: int) -> None:
        self.key = key
        self.share = share
        self.settled = settled
        self.pending = 0
        self.cost = self.announced = _LEARNED_START
        self.places: list[tuple[int, int, Place[T]]] = []
        self.at: tuple[int, int] = (0, 0)


class Place(Generic[T]):
    """A request's place in the queue, to be given to `take` or `leave` once."""

    __slots__ = ("account", "entry", "item")

    def __init__(self, account: _Account[T], item: T, priority: int, number: int) -> None:
        self.account = account
        self.item = item
        self.entry: tuple[int, int, Place[T]] = (priority, number, self)


class FairQueue(Generic[T]):
    """Accounts of the keys of one endpoint, and its waiting requests in fair order.

    Within a key the request with the smallest priority is next, and among those the one that came first.
    Keys with equal accounts are served in the order in which their next requests came.

    Args:
        credit: Tokens that a key may save up.

    Attributes:
        under_way: Requests that are being served.
    """

    __slots__ = (
        "_accounts",
        "_accounts_max",
        "_credit",
        "_keys",
        "_number",
        "_size",
        "_virtual",
        "under_way",
    )

    def __init__(self, credit: int = CREDIT) -> None:
        self._credit = credit * _UNITS
        self._accounts: dict[str, _Account[T]] = {}
        self._accounts_max = 2 * _ACCOUNTS_MIN
        # Waiting keys: account, number of the next request, and the account itself.
        self._keys: list[tuple[int, int, _Account[T]]] = []
        self._number = 0
        self._size = 0
        self._virtual = 0
        self.under_way = 0

    def __len__(self) -> int:
        """How many requests wait."""
        return self._size

    def __iter__(self) -> Iterator[T]:
        """All that wait, in the order in which they would be taken if nothing else came."""
        for _, _, account in self._keys:
            for _, _, place in account.places:
                yield place.item

    def join(self, key: str, share: int, item: T, *, priority: int = 0) -> Place[T]:
        """Let a request wait.

        Args:
            key: Whose it is.
            share: Of its key: one with twice the share is served twice as much.
            item: Handed out when it is its turn.
            priority: Among those of its key; smaller comes first.
        """
        account = self._account(key, share)
        if account.places:
            self._withdraw(account)
        else:
            self._lift(account)
        self._number += 1
        place = Place(account, item, priority, self._number)
        insort(account.places, place.entry)
        self._enter(account)
        self._size += 1
        return place

    def leave(self, place: Place[T]) -> None:
        """Let a request wait no longer."""
        account = place.account
        self._withdraw(account)
        del account.places[bisect_left(account.places, place.entry)]
        if account.places:
            self._enter(account)
        self._size -= 1

    def first(self) -> Place[T] | None:
        """The request whose turn it is; None when none waits."""
        return self._keys[0][2].places[0][2] if self._keys else None

    def in_order(self) -> list[Place[T]]:
        """All requests, as they would be taken if each key had but one."""
        return [entry[2] for _, _, account in self._keys for entry in account.places]

    def ahead(self, key: str, share: int) -> int:
        """How many waiting requests would probably be served before one more of this key."""
        account = self._accounts.get(key)
        own = len(account.places) if account is not None else 0
        turns = [(len(entry[2].places), entry[2].share) for entry in self._keys if entry[2] is not account]
        return own + sum(min(waiting, -(-(own + 1) * other // share)) for waiting, other in turns)

    def surplus(self, key: str, share: int) -> list[Place[T]]:
        """What another key has waiting beyond its part, if one more request of this key waits as well.

        The other key is the one that has the most waiting relative to its share; its last requests come first
        (longest queue drop: Suter et al., "Buffer Management Schemes for Supporting TCP in Gigabit Routers
        with Per-flow Queueing", 1999).
        """
        account = self._accounts.get(key)
        own = 1 + (len(account.places) if account is not None else 0)
        others = [entry[2] for entry in self._keys if entry[2] is not account]
        if not others:
            return []
        largest = max(others, key=lambda other: len(other.places) / other.share)
        keeps = -(-own * largest.share // share)
        return [entry[2] for entry in reversed(largest.places[keeps:])]

    def take(self, place: Place[T], cost: int) -> int:
        """Serve a waiting request; returns what `settle` wants to know.

        Args:
            place: Its place, which is gone afterwards.
            cost: What it announces to cost, in tokens.
        """
        account = place.account
        self.leave(place)
        return self._charge(account, cost)

    def serve(self, key: str, share: int, cost: int) -> int:
        """Serve a request that does not wait; returns what `settle` wants to know.

        Args:
            key: Whose it is.
            share: Of its key.
            cost: What it announces to cost, in tokens.
        """
        account = self._account(key, share)
        if not account.places:
            self._lift(account)
        return self._charge(account, cost)

    def settle(self, key: str, charged: int, announced: int, cost: int | None) -> None:
        """A request that was served has ended.

        Args:
            key: Whose it was.
            charged: From `take` or `serve`.
            announced: The cost given there.
            cost: What it has cost, in tokens; None if nobody knows, and then it was what was expected.
        """
        account = self._accounts[key]
        waits = bool(account.places)
        if waits:
            self._withdraw(account)
        self.under_way -= 1
        account.pending -= charged
        if cost is None:
            account.settled += charged
        else:
            account.settled += cost * _UNITS // account.share or 1
            # One that was refused, or reached nobody, says nothing of the others.
            if cost:
                account.cost += cost
                account.announced += announced
            if account.announced > _LEARNED_MAX:
                account.cost //= 2
                account.announced //= 2
        if waits:
            self._enter(account)

    def _charge(self, account: _Account[T], cost: int) -> int:
        self.under_way += 1
        expected = cost if account.cost >= account.announced else cost * account.cost // account.announced
        charged = expected * _UNITS // account.share or 1
        if account.settled > self._virtual:  # noqa: PLR1730 - runs for every request; max() takes three times as long
            self._virtual = account.settled
        if account.places:
            self._withdraw(account)
            account.pending += charged
            self._enter(account)
        else:
            account.pending += charged
        return charged

    def _account(self, key: str, share: int) -> _Account[T]:
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= self._accounts_max:
                self._forget()
            account = self._accounts[key] = _Account(key, share, self._virtual - self._credit // share)
        elif account.share != share:
            account.share = share
        return account

    def _lift(self, account: _Account[T]) -> None:
        least = self._virtual - self._credit // account.share
        account.settled = max(account.settled, least)

    def _forget(self) -> None:
        """Drop the accounts of keys that ask for nothing: who comes back is lifted to about where it was."""
        self._accounts = {
            key: account for key, account in self._accounts.items() if account.places or account.pending
        }
        self._accounts_max = 2 * max(_ACCOUNTS_MIN, len(self._accounts))

    def _enter(self, account: _Account[T]) -> None:
        account.at = (account.settled + account.pending, account.places[0][1])
        insort(self._keys, (*account.at, account))

    def _withdraw(self, account: _Account[T]) -> None:
        del self._keys[bisect_left(self._keys, account.at, key=_place_of)]


def _place_of(entry: tuple[int, int, object]) -> tuple[int, int]:
    return entry[:2]
