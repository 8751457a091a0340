"""How many GPUs a worker sees: vllm-worker.md §4.6 rule 1."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pilotlight.worker.gpus import ask_gpus, known_gpus, visible_gpus


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("0", 1),
        ("0,1", 2),
        ("GPU-a, GPU-b,GPU-c", 3),
        ("-1", 0),
        ("0,-1,1", 1),
        ("0,,1", 1),
        ("NoDevFiles", 1),
    ],
)
def test_the_variable_says_it(text: str, count: int) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": text}) == count


async def test_the_drivers_tool_says_it(tmp_path: Path) -> None:
    env, driver = {"PATH": str(tmp_path)}, tmp_path / "nothing"

    async def both() -> set[int]:
        return {visible_gpus(env, driver=driver), await ask_gpus(env, driver=driver)}

    assert await both() == {0}
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho '  MIG 1g.5gb Device 0: x'\necho 'GPU 1: A (UUID: GPU-2)'\n"
    )
    tool.chmod(0o755)
    assert await both() == {2}
    tool.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert await both() == {0}


@pytest.mark.parametrize(("folders", "count"), [((), 0), (("0000:01:00.0",), 1), (("a", "b"), None)])
def test_one_gpu_of_the_driver_needs_no_question(
    tmp_path: Path, folders: tuple[str, ...], count: int | None
) -> None:
    """A container may see fewer of several; of one there is nothing to choose."""
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert known_gpus({}, driver=tmp_path) == count


async def test_a_question_that_is_given_up_leaves_nobody_behind(tmp_path: Path) -> None:
    started = tmp_path / "started"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\necho $$ > {started}.new; /bin/mv {started}.new {started}; exec /bin/sleep 1000\n"
    )
    tool.chmod(0o755)
    asking = asyncio.create_task(ask_gpus({"PATH": str(tmp_path)}, driver=tmp_path / "nothing"))
    async with asyncio.timeout(10):
        while not started.exists():
            await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert not Path(f"/proc/{started.read_text().strip()}").exists()
