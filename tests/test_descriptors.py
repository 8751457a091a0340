"""The limit on open files: raised for the gateway, set back for its workers, and a shortage that is told."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from pilotlight.descriptors import NEEDED, STREAMS, WANTED, DescriptorLimit, set_descriptor_limit

RAISE = """
import json, resource, sys
from dataclasses import asdict
from pilotlight.descriptors import attainable_descriptor_limit, raise_descriptor_limit
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
attainable = attainable_descriptor_limit()
untouched = resource.getrlimit(resource.RLIMIT_NOFILE)
raised = raise_descriptor_limit()
now = resource.getrlimit(resource.RLIMIT_NOFILE)
again = raise_descriptor_limit()
print(json.dumps([asdict(attainable), untouched, asdict(raised), now, asdict(again)]))
"""


@pytest.mark.parametrize(("soft", "hard"), [(256, 3000), (900, 6000), (700, 700)])
def test_it_is_raised_to_what_may_be_had_and_the_first_one_is_remembered(soft, hard):
    command = [sys.executable, "-c", RAISE, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    attainable, untouched, raised, now, again = json.loads(done.stdout)
    assert attainable == raised == {"inherited": soft, "soft": hard, "hard": hard}
    assert untouched == [soft, hard]
    assert now == [hard, hard]
    assert again == {"inherited": hard, "soft": hard, "hard": hard}


def test_a_shortage_is_told_with_what_there_is_and_what_is_needed():
    short = DescriptorLimit(inherited=256, soft=3000, hard=3000)
    assert short.streams == 988
    for number in ("3000", "988", str(STREAMS), str(NEEDED)):
        assert number in short.shortage
    assert DescriptorLimit(256, NEEDED, NEEDED).shortage == ""
    assert DescriptorLimit(256, NEEDED, NEEDED).streams == STREAMS
    assert DescriptorLimit(256, 100, 100).streams == 0
    assert WANTED > NEEDED


def test_a_child_is_given_its_own_limit_and_keeps_the_hard_one():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        set_descriptor_limit(child.pid, 300)
        assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (300, hard)
        child.communicate(b"\n")
    set_descriptor_limit(child.pid, 300)
