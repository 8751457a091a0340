"""The worker program fetches what is missing before it starts the engine (vllm-worker.md §5.2, §7)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pilotlight.models.cache import exclusive_now
from pilotlight.models.catalog import builtin_folder
from pilotlight.testing.hub_server import HubServer
from pilotlight.testing.protocol_server import PlatformStub

Start = Callable[..., Any]

NAME = "Org/Large"
SIZE = 45_000_000


@pytest.fixture
def hub() -> Iterator[HubServer]:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [SIZE // 2], "data_offsets": [0, SIZE]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(SIZE)
    files = {name: (builtin_folder() / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    with HubServer() as server:
        server.add(NAME, files | {"model.safetensors": weights})
        yield server


async def test_missing_weights_are_downloaded_with_progress_by_a_process_of_its_own(
    start_worker: Start, platform: PlatformStub, hub: HubServer
) -> None:
    """1. The download is reported in bytes while the worker program stays small. 2. The engine gets a folder and
    no network, and serves the repository's id."""
    hold = hub.hold("model.safetensors")
    worker = await start_worker(MODEL_NAME=NAME, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
    report = await platform.stage("downloading")
    assert 0 <= report["detail"]["done_bytes"] < report["detail"]["total_bytes"]
    assert await asyncio.to_thread(hold.reached.wait, 30)
    (download,) = psutil.Process(worker.pid).children()
    assert "pilotlight.models.fetch" in download.cmdline()
    assert "hf_secret" not in " ".join(download.cmdline())
    hold.release.set()
    ready = await worker.ready()
    assert ready["models"][0] == NAME
    assert psutil.Process(worker.pid).memory_info().rss < 60_000_000
    argv = worker.recorded("start")[0]["argv"]
    folder = argv[argv.index("--model") + 1]
    # A cache on a volume is for everybody, whatever the worker keeps to itself.
    assert {path.stat().st_mode & 0o777 for path in Path(folder).iterdir()} == {0o644}
    assert Path(folder).stat().st_mode & 0o777 == 0o755
    assert f"models--{NAME.replace('/', '--')}/snapshots/" in folder
    names = argv[argv.index("--served-model-name") + 1 :][:3]
    assert names == [NAME, NAME.lower(), folder]
    environment = Path(f"/proc/{worker.engine_pid}/environ").read_text().split("\0")
    assert "HF_HUB_OFFLINE=1" in environment
    stages = list(dict.fromkeys(state["stage"] for state in platform.states))
    assert stages[:3] == ["starting", "downloading", "importing"]


async def test_a_worker_that_is_told_to_go_ends_its_download(
    start_worker: Start, platform: PlatformStub, hub: HubServer, tmp_path: Path
) -> None:
    """The part that has come is kept for the next one."""
    hold = hub.hold("model.safetensors")
    worker = await start_worker(MODEL_NAME=NAME, HF_ENDPOINT=hub.url)
    assert await asyncio.to_thread(hold.reached.wait, 30)
    (download,) = psutil.Process(worker.pid).children()
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert not download.is_running()
    with exclusive_now(tmp_path / "hub", NAME) as holder:
        assert holder is None
    assert worker.recorded("start") == []


async def test_what_cannot_be_had_fails_the_start_with_its_class(
    start_worker: Start, platform: PlatformStub, hub: HubServer
) -> None:
    """§10 point 13: gated repository; class and fix are reported, the exit code is 1."""
    hub.repositories[NAME].gated = True
    worker = await start_worker(MODEL_NAME=NAME, HF_ENDPOINT=hub.url)
    failed = await platform.stage("failed")
    assert failed["detail"]["kind"] == "unauthorized"
    assert failed["detail"]["cause"] == f"model {NAME} is gated"
    assert "HF_TOKEN" in failed["detail"]["advice"]
    assert await worker.exit_code() == 1
    assert worker.recorded("start") == []
