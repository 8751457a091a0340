"""`pilotlight launchers`: the processes that engines are forked from."""

from __future__ import annotations

from collections.abc import Mapping

from pilotlight.cli.output import JsonOption, connect, note, print_json, print_table, size


def launchers_command(as_json: JsonOption = False) -> None:
    """List the launchers that engines are forked from.

    A launcher has imported the engine, so a worker that asks it has an engine within a second or two. There
    is one for all endpoints that agree in engine and environment.

    Examples:
      pilotlight launchers
      pilotlight launchers --json
    """
    with connect() as client:
        launchers = client.launchers()
        names = {one["id"]: one["name"] for one in client.endpoints()}
    if as_json:
        print_json(launchers)
        return
    if not launchers:
        note("no launchers; `pilotlight doctor` says why")
        return
    print_table(
        ["LAUNCHER", "VLLM", "STATE", ">PID", ">MEMORY", ">LAUNCHES", ">ENGINES", "ENDPOINTS"],
        [
            [
                one["fingerprint"],
                one["engine_version"],
                one["state"],
                one["pid"],
                "" if one["memory_bytes"] is None else size(one["memory_bytes"]),
                one["launches"],
                one["engines"],
                _names(one["endpoints"], names),
            ]
            for one in launchers
        ],
    )
    for one in launchers:
        if one["problem"]:
            note(f"launcher {one['fingerprint']}: {one['problem']}; its log is logs/{one['log']}.log")


def _names(endpoint_ids: list[str], names: Mapping[str, str]) -> str:
    return ", ".join(names.get(endpoint_id, endpoint_id) for endpoint_id in endpoint_ids)
