"""A user's worker, run with whichever release of the `runpod` package: `worker_program.py KIND CONCURRENCY`."""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import runpod

BIG = "x" * 1_000_000


def circle():
    value = []
    value.append(value)
    return value


# What a handler may return, by name (worker-protocol.md §4.2).
RETURNS = {
    "none": lambda: None,
    "empty": dict,
    "error": lambda: {"error": "user level", "detail": 42},
    "error_only": lambda: {"error": {"code": 5}},
    "falsy_error": lambda: {"error": "", "ok": 1},
    "refresh": lambda: {"refresh_worker": True, "ok": 1},
    "output": lambda: {"output": {"deep": 1}},
    "nan": lambda: float("nan"),
    "infinity": lambda: {"value": float("inf")},
    "tuple": lambda: (1, 2),
    "integer_keys": lambda: {1: "one"},
    "bytes": lambda: b"raw",
    "set": lambda: {1, 2},
    "object": object,
    "circle": circle,
    "surrogate": lambda: "\ud800",
}


def plain(job):
    value = job["input"]
    do = value.get("do", "echo")
    if do in RETURNS:
        return RETURNS[do]()
    if do == "raise":
        raise ValueError("boom")
    if do == "memory":
        raise MemoryError("too much")
    if do == "exit":
        sys.exit(3)
    if do == "os_exit":
        os._exit(3)
    if do == "block":
        time.sleep(value["seconds"])
    if do == "big":
        return BIG * value["megabytes"]
    if do == "progress":
        for step in range(value["steps"]):
            runpod.serverless.progress_update(job, f"step {step}")
        wait_for(value["release"])
    if do == "wait":
        mark(value)
        wait_for(value["release"])
    return {"echo": value.get("n"), "keys": sorted(job)}


def mark(value):
    """Say that the handler runs, and where it runs."""
    with Path(value["release"] + ".started").open("a") as file:
        file.write(f"{os.environ['RUNPOD_POD_ID']}\n")


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.02)


async def coroutine(job):
    value = job["input"]
    if value.get("do") == "cancelled":
        raise asyncio.CancelledError
    if value.get("do") in {"wait", "stubborn"}:
        mark(value)
        while not Path(value["release"]).exists():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                if value["do"] == "wait":
                    raise
        return {"echo": value.get("n"), "keys": sorted(job)}
    return plain(job)


def generator(job):
    for word in job["input"]["words"]:
        if word == "raise":
            raise ValueError("boom mid stream")
        yield {"error": {"code": 7}} if word == "error" else word


async def async_generator(job):
    for word in generator(job):
        yield word
        await asyncio.sleep(0)


def end_with(parent):
    """A worker whose platform is gone asks for ever: when the test run itself is killed, end the whole group."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
kind, concurrency = sys.argv[1], int(sys.argv[2])
config = {
    "handler": {
        "sync": plain,
        "async": coroutine,
        "refresh": coroutine,
        "unfit": coroutine,
        "generator": generator,
        "generator-list": generator,
        "async-generator": async_generator,
        "async-generator-list": async_generator,
    }[kind]
}
if kind.endswith("-list"):
    config["return_aggregate_stream"] = True
if kind == "refresh":
    config["refresh_worker"] = True
if kind == "unfit":

    @runpod.serverless.register_fitness_check
    def model_is_there():
        raise RuntimeError("model file is missing")


if concurrency > 1:
    config["concurrency_modifier"] = lambda _: concurrency
runpod.serverless.start(config)
