"""How a connection to the database is made, how it treats text, and what its errors mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from pilotlight.errors import PilotlightError, SettingsError, StoreError

CONNECT_TIMEOUT_S = 10.0
"""To connect, and to be let in."""

COMMAND_TIMEOUT_S = 60.0
"""For one statement: longer than any takes, so that a server that hangs is told from a slow one."""

FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # Raised when a connection is lost at the wrong moment.
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""What asyncpg raises when the database cannot do its work."""

LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,
    asyncpg.CannotConnectNowError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""Those after which nobody knows what became of a commit under way, `asyncpg.DataError` excepted."""


class BadValueError(StoreError):
    """The database does not take a value: the fault of what was asked for, not of the database."""


_SERVER_SETTINGS = {
    "application_name": "pilotlight",
    # Compiling a query takes longer than any of ours runs.
    "jit": "off",
    # Every query is made for an index and for loops over few rows. Left to statistics, which a young table
    # does not have, plans are chosen for the empty queue and kept for the full one.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "default_transaction_isolation": "read committed",
    # A gateway that is gone without a word must not keep rows or the lead to itself for long.
    "idle_in_transaction_session_timeout": "60000",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}

_ESCAPE = "\ufdd0"
"""A code point that is no character and never will be; followed by four hex digits it stands for another."""

_UNSTORABLE = re.compile(f"[\x00{_ESCAPE}\ud800-\udfff]")
_ESCAPED = re.compile(f"{_ESCAPE}([0-9a-f]{{4}})")


def encode_text(text: str) -> str:
    """Text as PostgreSQL can keep it: NUL and lone surrogates are escaped."""
    if _UNSTORABLE.search(text) is None:
        return text
    return _UNSTORABLE.sub(lambda match: f"{_ESCAPE}{ord(match[0]):04x}", text)


def decode_text(text: str) -> str:
    """The text that `encode_text` was given."""
    if _ESCAPE not in text:
        return text
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def encode_all(values: Sequence[Any]) -> Sequence[Any]:
    """The values of an array parameter, text among them as `encode_text` makes it.

    The driver's converters for text do not reach into arrays.
    """
    if not isinstance(next((value for value in values if value is not None), None), str):
        return values
    return [value if value is None else encode_text(value) for value in values]


class PlainConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that need not be cleaned when it goes back to the pool: nothing of ours sticks to it."""

    __slots__ = ()

    def get_reset_query(self) -> str:
        """No query: it would cost a round trip per transaction."""
        return ""


def check_url(url: str) -> None:
    """Return when a url can name a database.

    Raises:
        SettingsError: It cannot; the message does not repeat its password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise SettingsError(
            "store.url is not a URL; legal: postgresql://user:password@host/database"
        ) from None
    if parts.scheme not in {"postgresql", "postgres"}:
        raise SettingsError(
            f"store.url begins with {parts.scheme + '://' if parts.scheme else 'no scheme'};"
            " legal: postgresql://user:password@host/database, or nothing for SQLite in the data folder"
        )


def public_url(url: str) -> str:
    """The url for people: host and database, no user, no password, no options."""
    parts = urlsplit(url)
    if "@" in parts.path + parts.query + parts.fragment:
        # The password has a character that ends what comes before the path, so no part is known to be public.
        return "postgresql://(not shown: write /, ?, # and @ in the password as %2F, %3F, %23 and %40)"
    hosts = parts.netloc.rpartition("@")[2]
    return f"postgresql://{hosts}{parts.path}"


async def prepare(connection: Any) -> None:
    """Make a new connection treat text as we need it."""
    await connection.set_type_codec(
        "text", schema="pg_catalog", encoder=encode_text, decoder=decode_text, format="text"
    )


async def create_pool(url: str, *, size: int) -> Any:
    """A pool of prepared connections, the first of them open.

    Raises:
        SettingsError: The url or what it names is wrong.
        StoreError: The server cannot be reached or refuses us.
    """
    try:
        pool = await asyncpg.create_pool(
            url,
            connection_class=PlainConnection,
            init=prepare,
            # None is kept for its own sake: the pool would report each try to replace it.
            min_size=0,
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            server_settings=_SERVER_SETTINGS,
        )
        async with pool.acquire():
            return pool
    except FAILURES as error:
        raise store_error(error, f"the database {public_url(url)} cannot be opened") from error
    except ValueError:
        # asyncpg repeats the url in its message.
        raise SettingsError("store.url is not one that asyncpg understands") from None


async def connect(url: str) -> Any:
    """One connection outside the pool, for locks and notifications.

    Raises:
        StoreError: The server cannot be reached or refuses us.
    """
    try:
        connection = await asyncpg.connect(
            url,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            server_settings=_SERVER_SETTINGS,
        )
    except FAILURES as error:
        raise store_error(error, f"the database {public_url(url)} cannot be reached") from error
    try:
        await prepare(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def store_error(error: BaseException, what: str) -> StoreError:
    """The error for a failure of the database, without the server's details: they repeat values of rows."""
    if type(error) is asyncpg.DataError:
        # The driver's own, which repeats the value.
        text = "a value is not one that its column can hold"
    elif isinstance(error, asyncpg.PostgresError):
        text = f"{error.args[0] if error.args else type(error).__name__} (SQLSTATE {error.sqlstate})"
    else:
        text = str(error) or type(error).__name__
    bad = isinstance(error, asyncpg.DataError) or (getattr(error, "sqlstate", None) or "").startswith("22")
    failure = (BadValueError if bad else StoreError)(f"{what}: {text}")
    failure.__cause__ = error
    return failure


def translated(error: BaseException) -> BaseException:
    """A failure of the database as `StoreError`, any other error as it is."""
    if isinstance(error, PilotlightError) or not isinstance(error, FAILURES):
        return error
    return store_error(error, "the database could not do its work, nothing was changed")
