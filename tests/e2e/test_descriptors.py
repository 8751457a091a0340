"""The limit on open files of a gateway and its workers, in a shell that allows too few."""

from __future__ import annotations

import resource

from . import conftest

LIMITED = ["sh", "-c", 'ulimit -S -n 300; ulimit -H -n 3000; exec "$@"', "sh", *conftest.PROGRAM]


def test_the_gateway_takes_what_there_is_and_says_that_it_is_little_and_workers_get_what_they_had(
    make_installation, monkeypatch
):
    monkeypatch.setattr(conftest, "PROGRAM", LIMITED)
    installation = make_installation().start()
    assert resource.prlimit(installation.pid, resource.RLIMIT_NOFILE) == (3000, 3000)
    log = installation.log.read_text()
    assert "few_descriptors" in log
    assert "LimitNOFILE" in log
    endpoint = installation.deploy()
    assert endpoint.chat("hello").status_code == 200
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in installation.processes()}
    assert limits
    assert set(limits.values()) == {(300, 3000)}, limits
