"""Places where workers run. Today: processes of this machine (`local`).

`local.LocalCluster` implements the port `Cluster`; it finds and ends processes with `processes`, keeps
their output with `logs`, and `devices` says what the machine has. Wired up in `bootstrap`.
"""

from __future__ import annotations

from pilotlight.clusters.devices import read_host
from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.logs import LogLine, LogSource, WorkerLogs

__all__ = ["LocalCluster", "LogLine", "LogSource", "WorkerLogs", "read_host"]
