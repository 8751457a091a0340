"""What the gateway's memory lies in, as the kernel counts it. Kernels differ, so what is said is compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pilotlight import huge_pages

LOOK = """
import asyncio, ctypes, json, mmap
from pathlib import Path
from pilotlight import huge_pages

def table():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines}
"""

FULL = """
objects = [{"number": n, "text": str(n)} for n in range(200_000)]
problem, before = huge_pages.why_no_huge_pages(), table()["AnonHugePages"]
done = 0 if problem else huge_pages.collapse()
held = table()
intact = all(one == {"number": n, "text": str(n)} for n, one in enumerate(objects))
again = done if problem else huge_pages.collapse()
print(json.dumps([problem, before, held["AnonHugePages"], held["Rss"], done >> 20, again >> 20, intact]))
"""

SPARSE = """
# A quarter of every 2 MiB is in use, as of a thread's stack or a heap that has shrunk.
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for start in range(0, len(memory), 2 << 20):
    memory[start : start + (512 << 10)] = b"x" * (512 << 10)
memory.madvise(mmap.MADV_HUGEPAGE)
put = (lambda: 0) if huge_pages.why_no_huge_pages() else huge_pages.collapse
print(json.dumps([put() >> 20, table()["Rss"]]))
"""

REFUSED = """
PR_SET_THP_DISABLE = 41  # linux/prctl.h
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
asyncio.run(asyncio.wait_for(huge_pages.keep_in_huge_pages(), 20))
print(json.dumps([huge_pages.why_no_huge_pages(), table()["AnonHugePages"]]))
"""


def _run(program: str) -> list:
    command = [sys.executable, "-c", LOOK + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_full_is_put_into_huge_pages_where_the_kernel_has_them_and_stays_what_it_was():
    problem, before, after, resident, done, again, intact = _run(FULL)
    assert intact
    assert done == again
    if problem:
        assert after == before
        assert "huge pages" in problem or "kernel" in problem
    else:
        assert done <= after
        assert after > before + 16
        assert after > resident / 3


def test_what_is_mostly_empty_is_left_alone():
    done, resident = _run(SPARSE)
    assert done < 32
    assert resident < 64


def test_a_process_that_may_not_have_them_is_told_so_and_goes_on_without():
    problem, huge = _run(REFUSED)
    assert problem
    assert huge == 0


def test_a_kernel_without_fitting_ones_is_asked_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(huge_pages, "_KERNEL", tmp_path)
    assert "no transparent huge pages" in huge_pages.why_no_huge_pages()
    Path(tmp_path, "hpage_pmd_size").write_text("2097152\n")
    Path(tmp_path, "enabled").write_text("always madvise [never]\n")
    assert "says never" in huge_pages.why_no_huge_pages()
    Path(tmp_path, "enabled").write_text("always [madvise] never\n")
    Path(tmp_path, "hpage_pmd_size").write_text(f"{512 << 20}\n")
    assert "512 MiB" in huge_pages.why_no_huge_pages()
