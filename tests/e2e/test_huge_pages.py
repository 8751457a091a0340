"""Every process of a gateway puts its memory into huge pages, where the kernel has them and it may."""

from __future__ import annotations

from pathlib import Path

from pilotlight.huge_pages import why_no_huge_pages


def _huge_mb(pid: int) -> int:
    """What one process has in huge pages, as the kernel counts it."""
    table = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in table if line.startswith("AnonHugePages:"))


def test_the_processes_of_a_gateway_lie_in_huge_pages_unless_the_setting_says_no(make_installation, tools):
    without = make_installation(PILOTLIGHT_SERVER__HUGE_PAGES="false").start()
    installation = make_installation(PILOTLIGHT_SERVER__PROCESSES="2").start()
    gateways = [installation.pid, *installation.processes()]
    assert len(gateways) == 3
    problem = why_no_huge_pages()
    if problem:
        tools.until(lambda: problem in installation.log.read_text(), "why there are none is in the log")
    else:
        tools.until(lambda: min(map(_huge_mb, gateways)) >= 10, "huge pages")
    always = "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    assert problem or always or _huge_mb(without.pid) == 0
    assert "no_huge_pages" not in without.log.read_text()
