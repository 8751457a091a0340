"""What commands print: JSON or tables on standard output, everything else on standard error.

Text that comes from models, engines and other people's endpoints is cleaned before it reaches a terminal, so
that it cannot move the cursor or change the window's title.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TextIO

import typer

from pilotlight.client import PilotlightClient, find_access

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
EndpointArgument = Annotated[
    str, typer.Argument(metavar="ENDPOINT", help="Id or name of an endpoint (`pilotlight ls`).")
]

_CONTROLS = {code: "�" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_WIDE = 10_000
"""Columns of a table that no terminal shows: rows must not wrap where a program reads them."""

_FILE_COLUMNS = 100
"""Columns of a drawing that no terminal shows."""


def connect() -> PilotlightClient:
    """A client for the gateway that the environment or the data folder names."""
    return PilotlightClient.of(find_access())


def clean(text: object) -> str:
    """The text without control characters other than line breaks and tabs."""
    return str(text).translate(_CONTROLS)


def write(text: str, *, stream: TextIO | None = None) -> None:
    """Write at once; cleaned where a terminal shows it, as it is where a program reads it."""
    stream = stream or sys.stdout
    stream.write(clean(text) if stream.isatty() else text)
    stream.flush()


def read_stdin(characters_max: int, *, param_hint: str) -> str:
    """All of standard input.

    Raises:
        typer.BadParameter: It is longer than that, or not text.
    """
    try:
        text = sys.stdin.read(characters_max + 1)
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not text: {error}", param_hint=param_hint) from error
    if len(text) > characters_max:
        raise typer.BadParameter(
            f"standard input holds more than {characters_max} characters", param_hint=param_hint
        )
    return text


def note(text: str) -> None:
    """Tell the person something beside the result."""
    write(f"{text}\n", stream=sys.stderr)


def print_json(value: object) -> None:
    """One JSON document on standard output, readable where a terminal shows it."""
    sys.stdout.write(json.dumps(value, indent=2 if sys.stdout.isatty() else None) + "\n")
    sys.stdout.flush()


def print_json_line(value: object) -> None:
    """One JSON object on a line of its own, for output without an end."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table without frames; columns whose name begins with `>` are flush right."""
    from rich.console import Console  # noqa: PLC0415 - not needed with --json
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        # Text, not str: Rich would read square brackets in a name as markup.
        table.add_row(*(Text("-" if cell is None or cell == "" else clean(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    # Rich ends the process by itself when the reader has gone; captured, the text takes our own way out.
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().split("\n")))
    sys.stdout.flush()


def print_lines(draw: Callable[[int], Sequence[Sequence[tuple[str, str]]]]) -> None:
    """A drawing, line by line; each is pieces of text with a Rich style each, "" for none.

    Args:
        draw: Makes the drawing for a number of columns: the terminal's, or a usual one for a file.
    """
    from rich.console import Console  # noqa: PLC0415 - not needed with --json
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    lines = draw(console.width if sys.stdout.isatty() else _FILE_COLUMNS)
    with console.capture() as capture:
        for pieces in lines:
            line = Text.assemble(*((clean(text), style) for text, style in pieces))
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
    sys.stdout.write(capture.get())
    sys.stdout.flush()


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        write(f"{name.ljust(width)}  {'-' if value is None else value}\n")


def show_value(value: Any, *, indent: int | None = 2) -> str:
    """A job's output for a person: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, indent=indent, ensure_ascii=False)


def duration(seconds: float) -> str:
    """A length of time in its two largest units: `850 ms`, `4.2 s`, `3 m 20 s`, `2 h 5 m`, `3 d 4 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} m"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def size(count: float) -> str:
    """A number of bytes in its largest decimal unit: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
