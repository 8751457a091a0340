"""What `pilotlight deploy` is told about containers: image, volumes, shared memory, registry."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated, Any

import typer

from pilotlight.cli.output import note

PASSWORD_VARIABLE = "PILOTLIGHT_REGISTRY_PASSWORD"  # noqa: S105 - the name of a variable
"""The registry's password is read from here, so that no process list and no shell history shows it."""

ImageOption = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="IMAGE",
        help="Run workers as containers of this image, of any --kind; --command is then arguments for it.",
    ),
]
VolumeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        metavar="SOURCE:TARGET[:ro]",
        help="A folder of the gateway's machine, or a named volume, and where containers see it; a network"
        " volume belongs at /runpod-volume. Repeatable.",
    ),
]
ShmOption = Annotated[
    str | None, typer.Option("--shm-size", metavar="SIZE", help="Size of a container's /dev/shm, such as 8G.")
]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry-user",
        metavar="USER",
        help=f"Who fetches the --image; the password is taken from {PASSWORD_VARIABLE}, or asked for.",
    ),
]


def parse_volume(text: str) -> dict[str, Any]:
    """A volume as the gateway wants it.

    Raises:
        typer.BadParameter: It is not of the form SOURCE:TARGET or SOURCE:TARGET:ro.
    """
    parts = text.split(":")
    mode = parts.pop() if len(parts) == 3 else "rw"
    if len(parts) != 2 or not all(parts) or mode not in {"ro", "rw"}:
        message = f"{text!r} is not SOURCE:TARGET or SOURCE:TARGET:ro"
        raise typer.BadParameter(message, param_hint="--volume")
    source, target = parts
    if source.startswith((".", "~")):
        source = os.path.abspath(os.path.expanduser(source))  # noqa: PTH100, PTH111 - links stay
        note(f"containers see {source} as {target}")
    return {"source": source, "target": target, "read_only": mode == "ro"}


def parse_arguments(text: str) -> list[str]:
    """The arguments for an image, which has its own files.

    Raises:
        typer.BadParameter: It is empty, or has a quote that nothing closes.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--command") from error
    if not words:
        raise typer.BadParameter("is empty", param_hint="--command")
    return words


def registry_password(user: str) -> str:
    """The password of a registry's user, from the environment or from whoever sits at the terminal.

    Raises:
        typer.BadParameter: It is in neither place.
    """
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password and sys.stdin.isatty():
        password = typer.prompt(f"Password or token of {user}", hide_input=True, err=True)
    if not password:
        message = f"needs the password in {PASSWORD_VARIABLE}"
        raise typer.BadParameter(message, param_hint="--registry-user")
    return password
