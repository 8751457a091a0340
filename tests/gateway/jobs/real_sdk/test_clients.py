"""Unmodified client libraries against a gateway with an unmodified worker (serverless-api.md §9)."""

from __future__ import annotations

import asyncio

import pytest

pytestmark = pytest.mark.timeout(400)  # the first test of a machine builds the environment of its release

PYTHON = """
import json, os, sys, time
import runpod

runpod.api_key = "rpa_RUNNER"
words, work = runpod.Endpoint("words"), runpod.Endpoint("ep1")
gate = os.environ["GATE"]
seen = {"version": runpod.__version__}
seen["sync"] = work.run_sync({"input": {"n": 1}}, timeout=40)
job = work.run({"n": 2})
seen["output"] = job.output(timeout=40)
seen["status"] = job.status()
seen["failed"] = work.run({"do": "raise"})
while seen["failed"].status() != "FAILED":
    time.sleep(0.05)
seen["failed"] = [seen["failed"].status(), seen["failed"].output()]
slow = work.run({"do": "wait", "release": gate})
while slow.status() != "IN_PROGRESS":
    time.sleep(0.05)
queued = [work.run({"n": n}) for n in range(3)]
seen["health"] = work.health()["jobs"]
seen["purged"] = work.purge_queue()
seen["cancelled"] = [slow.cancel()["status"], slow.status()]
stream = words.run({"words": ["one", {"two": 2}, "drei"]})
seen["stream"] = list(stream.stream())
print(json.dumps(seen))
"""

ASYNC_PYTHON = """
import asyncio, json, os
import runpod
from runpod import AsyncioEndpoint, http_client

runpod.api_key = "rpa_RUNNER"
Session = getattr(http_client, "AsyncClientSession", None) or http_client.ClientSession

async def main():
    async with Session() as session:
        work, words = AsyncioEndpoint("ep1", session), AsyncioEndpoint("words", session)
        job = await work.run({"n": 3})
        seen = {"output": await job.output(timeout=40), "status": await job.status()}
        stream = await words.run({"words": ["a", "b"]})
        seen["stream"] = [part async for part in stream.stream()]
        slow = await work.run({"do": "wait", "release": os.environ["GATE"]})
        seen["cancelled"] = (await slow.cancel())["status"]
        return seen

print(json.dumps(asyncio.run(main())))
"""

NODE = """
import runpodSdk from "runpod-sdk";

const log = console.log;
console.log = () => {};
const runpod = runpodSdk("rpa_RUNNER", { baseUrl: process.env.BASE });
const work = runpod.endpoint("ep1"), words = runpod.endpoint("words");
const seen = {};
seen.sync = await work.runSync({ input: { n: 1 } }, 40000);
const { id } = await work.run({ input: { n: 2 } }, 20000);
let last;
do { last = await work.status(id, 20000); } while (!last.completed);
seen.status = last;
seen.failed = await work.runSync({ input: { do: "raise" } }, 40000);
const retry = `${process.env.BASE}/ep1/retry/${seen.failed.id}`;
const headers = { Authorization: "Bearer rpa_RUNNER" };
seen.retried = (await (await fetch(retry, { method: "POST", headers })).json()).status;
seen.failedAgain = await work.statusSync(seen.failed.id, 40000);
const slow = await work.run({ input: { do: "wait", release: process.env.GATE } }, 20000);
while ((await work.status(slow.id, 20000)).status !== "IN_PROGRESS");
await work.run({ input: { n: 4 } }, 20000);
seen.health = (await work.health(20000)).jobs;
seen.purged = await work.purgeQueue(20000);
seen.cancelled = await work.cancel(slow.id, 20000);
const stream = await words.run({ input: { words: ["one", { two: 2 }, "drei"] } }, 20000);
seen.stream = [];
for await (const part of words.stream(stream.id)) seen.stream.push(part.output);
seen.later = await work.statusSync(stream.id, 20000).catch((error) => error.response.status);
log(JSON.stringify(seen));
"""


@pytest.fixture
async def served(lab):
    """A gateway with one worker of each of two endpoints."""
    await lab.endpoint("words")
    key = lab.platform.directory.key("rpa_RUNNER")
    object.__setattr__(key, "endpoint_ids", frozenset({"ep1", "words"}))
    await asyncio.gather(
        lab.worker("async"),
        lab.worker("async-generator-list", endpoint="words"),
    )
    return lab


def variables(lab):
    return {"GATE": str(lab.gate("never").path), "RUNPOD_ENDPOINT_BASE_URL": f"{lab.platform.base}/v2"}


@pytest.mark.parametrize("release", ["1.12", "1.7"])
async def test_python_clients(served, python_client, run_client, release):
    """Endpoint: run, run_sync, status, output, stream, cancel, purge_queue, health; and AsyncioEndpoint."""
    python = python_client(release)
    seen = await run_client(python, "-c", PYTHON, **variables(served))
    assert seen["version"].startswith(f"{release}.")
    assert seen["sync"] == {"echo": 1, "keys": ["id", "input"]}
    assert (seen["output"]["echo"], seen["status"]) == (2, "COMPLETED")
    assert seen["failed"] == ["FAILED", None]
    assert (seen["health"]["completed"], seen["health"]["failed"]) == (2, 1)
    assert (seen["health"]["inProgress"], seen["health"]["inQueue"]) == (1, 3)
    assert seen["purged"] == {"removed": 3, "status": "completed"}
    assert seen["cancelled"] == ["CANCELLED", "CANCELLED"]
    assert seen["stream"] == ["one", {"two": 2}, "drei"]
    assert await run_client(python, "-c", ASYNC_PYTHON, **variables(served)) == {
        "output": {"echo": 3, "keys": ["id", "input"]},
        "status": "COMPLETED",
        "stream": ["a", "b"],
        "cancelled": "CANCELLED",
    }


async def test_npm_client(served, node, node_folder, run_client):
    """`runpod-sdk` from npm: run, runSync, status, statusSync, stream, cancel, purgeQueue, health.

    It has no method for a retry, so that is a plain request.
    """
    script = served.folder / "client.mjs"
    script.write_text(NODE)
    # Modules are looked for beside the script.
    (served.folder / "node_modules").symlink_to(node_folder / "node_modules")
    seen = await run_client(node, str(script), BASE=f"{served.platform.base}/v2", **variables(served))
    assert (seen["sync"]["succeeded"], seen["sync"]["output"]["echo"]) == (True, 1)
    assert (seen["status"]["succeeded"], seen["status"]["output"]["echo"]) == (True, 2)
    assert (seen["failed"]["completed"], seen["failed"]["succeeded"]) == (True, False)
    assert (seen["retried"], seen["failedAgain"]["status"]) == ("IN_QUEUE", "FAILED")
    assert (seen["health"]["inProgress"], seen["health"]["inQueue"]) == (1, 1)
    assert seen["purged"] == {"removed": 1, "status": "completed"}
    assert seen["cancelled"]["status"] == "CANCELLED"
    assert seen["stream"] == ["one", {"two": 2}, "drei"]
    # A job of another endpoint is unknown here.
    assert seen["later"] == 404
