"""The command line of the benchmarks. Exit code 0 with all figures printed, whatever they say."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pilotlight.cli.root import help_text, new_app


class Engine(StrEnum):
    """What answers in `bench fairness`."""

    STAND_IN = "stand-in"
    VLLM = "vllm"


app = new_app()
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print nothing but one JSON object per figure; no table for people.")
]


@app.callback(no_args_is_help=True)
def bench() -> None:
    """Measure Pilotlight on this machine; nothing that runs on it is touched.

    Figures are JSON lines on standard output; progress and a table go to standard error.
    """


def gateway_command(
    seconds: Annotated[int, typer.Option(min=1, max=600, help="Length of each measurement.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often all of it is repeated.")] = 3,
    peers: Annotated[
        str,
        typer.Option(help="Proxies to measure beside ours, separated by commas; the first is the reference."),
    ] = "nginx,vllm-router,litellm",
    crowds: Annotated[
        bool, typer.Option(help="Also measure 1,000 streams at 20 events a second and 2,000 at 5.")
    ] = True,
    many: Annotated[
        int, typer.Option(min=0, max=1_000_000_000, help="Requests after which memory is compared; 0: none.")
    ] = 1_000_000,
    as_json: JsonOption = False,
) -> None:
    """What the gateway costs per request and per streamed event, in time and in memory, beside other proxies.

    Needs nginx and wrk; the other proxies are installed on first use into environments of their own, and left
    out where that fails. Takes about a quarter of an hour.
    """
    from pilotlight.bench.figures import Report  # noqa: PLC0415 - `--help` must stay quick
    from pilotlight.bench.gateway import run  # noqa: PLC0415
    from pilotlight.bench.gateway_loads import CROWDS, Load  # noqa: PLC0415

    shown = CROWDS if crowds else ()
    load = Load(seconds=seconds, rounds=rounds, peers=_names(peers), crowds=shown, many=many)
    run(load, Report("gateway", as_json=as_json))


def coldstart_command(
    starts: Annotated[
        int, typer.Option(min=1, max=100, help="Plain starts of vLLM, and cold ones of ours.")
    ] = 10,
    launches: Annotated[int, typer.Option(min=0, max=1000, help="Starts from the launcher.")] = 30,
    thaws: Annotated[int, typer.Option(min=0, max=10_000, help="Thaws of a frozen worker.")] = 100,
    crowd: Annotated[
        int,
        typer.Option(
            min=0, max=100, help="Frozen endpoints, and plain servers, that are held at once; 0: none."
        ),
    ] = 10,
    bursts: Annotated[
        int, typer.Option(min=0, max=100, help="Bursts of 10 requests to 5 endpoints; 0: none.")
    ] = 3,
    arrivals: Annotated[
        int, typer.Option(min=0, max=1000, help="Arrivals at an endpoint without workers; 0 leaves them out.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """From a request to its first token, from every rung of the warm ladder, beside a plain vLLM server.

    Needs the engine (`make setup`), and memory for as many plain servers as --crowd says (1.5 GB each). Takes
    about half an hour on two cores.
    """
    from pilotlight.bench.coldstart import Plan, run  # noqa: PLC0415
    from pilotlight.bench.figures import Report  # noqa: PLC0415

    plan = Plan(starts=starts, launches=launches, thaws=thaws, arrivals=arrivals, crowd=crowd, bursts=bursts)
    run(plan, Report("coldstart", as_json=as_json))


def throughput_command(
    pairs: Annotated[int, typer.Option(min=2, max=1000, help="Runs of each kind, in pairs.")] = 20,
    streams: Annotated[int, typer.Option(min=1, max=1000, help="Streams at the same time.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, max=1900, help="Tokens per stream.")] = 128,
    as_json: JsonOption = False,
) -> None:
    """Tokens per second through Pilotlight against the same vLLM without it.

    Needs the engine (`make setup`). Takes about three minutes on two cores.
    """
    from pilotlight.bench.figures import Report  # noqa: PLC0415
    from pilotlight.bench.throughput import run  # noqa: PLC0415

    run(pairs, streams, tokens, Report("throughput", as_json=as_json))


def queue_command(
    seconds: Annotated[int, typer.Option(min=1, max=600, help="Length of each measurement.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often all of it is repeated.")] = 3,
    deep: Annotated[
        int, typer.Option(min=0, max=10_000_000, help="Jobs in the deep queue; 0 leaves that part out.")
    ] = 1_000_000,
    peers: Annotated[
        str, typer.Option(help="Other queues to measure, separated by commas; an empty text leaves them out.")
    ] = "celery-redis,dramatiq-redis,procrastinate-postgresql",
    as_json: JsonOption = False,
) -> None:
    """What the job queue takes per second and how long jobs wait in it, beside other queues.

    Needs redis-server and PostgreSQL for the other queues; without them they are left out. Takes about ten
    minutes.
    """
    from pilotlight.bench.figures import Report  # noqa: PLC0415
    from pilotlight.bench.queue import run  # noqa: PLC0415
    from pilotlight.bench.queue_load import Load  # noqa: PLC0415

    load = Load(seconds=seconds, rounds=rounds, deep=deep, peers=_names(peers))
    run(load, Report("queue", as_json=as_json))


def routing_command(
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often all of it is repeated.")] = 3,
    groups: Annotated[int, typer.Option(min=2, max=1000, help="Long beginnings that prompts share.")] = 24,
    per_group: Annotated[int, typer.Option(min=2, max=1000, help="Requests with each beginning.")] = 10,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at the same time.")] = 8,
    policies: Annotated[
        str, typer.Option(help="Our routing policies to measure, separated by commas; the first one counts.")
    ] = "auto,prefix,session,least_loaded",
    as_json: JsonOption = False,
) -> None:
    """How many tokens of prompts two vLLM workers find in their caches, beside vLLM's own router.

    Needs the engine (`make setup`) and nginx. Takes about four minutes on two cores.
    """
    from pilotlight.bench.figures import Report  # noqa: PLC0415
    from pilotlight.bench.routing import Load, policies_of, run  # noqa: PLC0415

    ours = policies_of(_names(policies))
    load = Load(rounds=rounds, groups=groups, per_group=per_group, concurrency=concurrency, policies=ours)
    run(load, Report("routing", as_json=as_json))


def fairness_command(
    engine: Annotated[Engine, typer.Option(help="What answers.")] = Engine.STAND_IN,
    seconds: Annotated[int, typer.Option(min=1, max=600, help="Length of each measurement.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often all of it is repeated.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """How long the requests of nine light keys wait beside those of a greedy one.

    The engine is a stand-in with a fixed token rate, or vLLM (`make setup`). Takes about two minutes.
    """
    from pilotlight.bench.fairness import Load, run  # noqa: PLC0415
    from pilotlight.bench.figures import Report  # noqa: PLC0415

    load = Load(real=engine is Engine.VLLM, seconds=seconds, rounds=rounds)
    run(load, Report("fairness", as_json=as_json))


def worker_command(
    starts: Annotated[int, typer.Option(min=1, max=1000, help="Starts with the stand-in engine.")] = 10,
    jobs: Annotated[int, typer.Option(min=10, max=100_000, help="Jobs, one at a time.")] = 1000,
    pairs: Annotated[
        int, typer.Option(min=0, max=1000, help="Runs of each kind with vLLM, in pairs; 0 leaves them out.")
    ] = 20,
    streams: Annotated[int, typer.Option(min=1, max=1000, help="Streams at the same time.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, max=900, help="Tokens per stream.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """What the worker program adds to the engine: to a start, to a job, to a stream, and its memory.

    Needs the engine (`make setup`) unless --pairs is 0. Takes about four minutes on two cores.
    """
    from pilotlight.bench.figures import Report  # noqa: PLC0415
    from pilotlight.bench.worker import run  # noqa: PLC0415

    report = Report("worker", as_json=as_json)
    run(starts=starts, jobs=jobs, pairs=pairs, streams=streams, tokens=tokens, report=report)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


for _name, _function in (
    ("gateway", gateway_command),
    ("queue", queue_command),
    ("coldstart", coldstart_command),
    ("throughput", throughput_command),
    ("routing", routing_command),
    ("fairness", fairness_command),
    ("worker", worker_command),
):
    app.command(_name, help=help_text(_function))(_function)
