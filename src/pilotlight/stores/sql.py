"""Named queries of the SQL stores, loaded once from the `queries/*.sql` of their packages.

A file holds queries one after the other. Each begins with `-- name: <name>` and a sentence that says
what it does; the text up to the next name is the query.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

_NAME = re.compile(r"^-- name: (?P<name>[a-z_]+)\n(?P<sentence>(?:-- .+\n)+)", re.MULTILINE)


def parse_queries(text: str, *, source: str) -> Mapping[str, str]:
    """The queries of one file by name, without their comments.

    Args:
        text: Contents of the file.
        source: Its name, for messages.

    Raises:
        ValueError: No query, a query without text, or a name used twice.
    """
    queries: dict[str, str] = {}
    headings = list(_NAME.finditer(text))
    if not headings:
        raise ValueError(f"{source}: no query; each begins with '-- name: <name>' and a sentence")
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        name = heading["name"]
        query = text[heading.end() : following.start() if following else len(text)].strip().rstrip(";")
        if not query or name in queries:
            raise ValueError(f"{source}: query {name} is empty or there twice")
        queries[name] = query
    return MappingProxyType(queries)


def load_queries(package: str) -> Mapping[str, str]:
    """All queries of a package by name.

    Args:
        package: Its dotted name; the files lie in its folder `queries`.
    """
    queries: dict[str, str] = {}
    folder = importlib.resources.files(package) / "queries"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".sql"):
            continue
        for name, query in parse_queries(file.read_text(encoding="utf-8"), source=file.name).items():
            if name in queries:
                raise ValueError(f"{file.name}: query {name} is in another file already")
            queries[name] = query
    return MappingProxyType(queries)


def statements(script: str) -> Iterator[str]:
    """The statements of an SQL script, one by one.

    Drivers that run scripts as a whole commit an open transaction first, so scripts that have to run inside
    one are cut apart here.
    """
    pending = ""
    for line in script.splitlines(keepends=True):
        if not pending and (not line.strip() or line.lstrip().startswith("--")):
            continue
        pending += line
        if line.rstrip().endswith(";"):
            yield pending.strip()
            pending = ""
    if pending.strip():
        raise ValueError(f"SQL script ends inside a statement: {pending.strip()[:80]!r}")
