"""From a fork to an engine: the session, the descriptors, the environment, then vLLM's own entry point."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from pilotlight_engine.environment import replace

ENTRY_POINT = "vllm.entrypoints.openai.api_server"

UMASK = 0o077
"""Of worker programs, from which an engine would have it otherwise."""

_IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}


class RequestError(Exception):
    """What was asked for is not a launch; the message says why."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One engine to start.

    Attributes:
        arguments: vLLM's, without the program.
        environment: The whole environment.
        folder: Working folder.
        architectures: Classes of its model, as its `config.json` names them.
        worker_id: Of the worker that it belongs to.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    architectures: tuple[str, ...]
    worker_id: str

    @classmethod
    def read(cls, message: Any) -> Launch:
        """What a message asks for; raises RequestError."""
        if not isinstance(message, dict):
            raise RequestError(f"a launch must be a JSON object, not {type(message).__name__}")
        arguments, architectures = (_texts(message, name) for name in ("arguments", "architectures"))
        environment = message.get("environment")
        if not isinstance(environment, dict) or not all(
            isinstance(value, str) and "\0" not in name + value and name and "=" not in name
            for name, value in environment.items()
        ):
            raise RequestError("environment must be an object of strings without NUL characters")
        folder, worker_id = message.get("folder"), message.get("worker_id")
        if not isinstance(folder, str) or not folder.startswith("/"):
            raise RequestError(f"folder must be an absolute path, not {folder!r}")
        if not isinstance(worker_id, str):
            raise RequestError("worker_id must be a string")
        method = environment.get("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        if method != "fork":
            raise RequestError(f"VLLM_WORKER_MULTIPROC_METHOD is {method}, and a launcher forks")
        return cls(arguments, environment, folder, architectures, worker_id)


def become_engine(launch: Launch, output: int, own: Mapping[str, str], keep: int) -> None:
    """Turns this freshly forked process into what `subprocess` would have started.

    Args:
        launch: What to become.
        output: Descriptor for standard output and error.
        own: The launcher's environment.
        keep: A descriptor to leave open.

    Raises:
        EnvironmentRefusedError: See there.
        OSError: The folder is not there.
    """
    os.setsid()
    os.umask(UMASK)
    # What libraries handle (faulthandler, some that print a trace of C++) they would handle in any engine.
    for number in signal.valid_signals() - _IGNORED_BY_PYTHON:
        handler = signal.getsignal(number)
        if callable(handler) or handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one by which the list was read
    os.chdir(launch.folder)
    replace(launch.environment, own)
    sys.argv = ["engine", *launch.arguments]
    if (titles := sys.modules.get("setproctitle")) is not None:
        titles.setproctitle(" ".join((ENTRY_POINT, *launch.arguments)))
    # What Python draws at the start of a program, and all engines of one launcher would share.
    multiprocessing.current_process().authkey = os.urandom(32)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def run_entry_point() -> None:
    """Runs vLLM's server with the arguments in `sys.argv`, as `python -m` does."""
    # As where processes are spawned, this one has the tracker of shared memory. Else the first that needs it
    # has, and vLLM, which ends its processes with their children, would leave shared memory behind.
    resource_tracker.ensure_running()
    # Parts of it are imported already, that is the point.
    warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
    runpy.run_module(ENTRY_POINT, run_name="__main__", alter_sys=True)


def _texts(message: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = message.get(name)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise RequestError(f"{name} must be a list of strings")
    return tuple(value)
