"""`pilotlight deploy`: a model or a command becomes an endpoint, or an endpoint gets a new revision."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pilotlight.cli.containers import (
    ImageOption,
    RegistryOption,
    ShmOption,
    VolumeOption,
    parse_arguments,
    parse_volume,
    registry_password,
)
from pilotlight.cli.output import JsonOption, connect, duration, note, print_json, write
from pilotlight.cli.progress import Waiting, describe_failure, describe_progress, watch_start
from pilotlight.cli.targets import match_endpoint
from pilotlight.client import BusyError, GatewayError, PilotlightClient
from pilotlight.client.models import Endpoint, Failure
from pilotlight.errors import PilotlightError

WAIT_S_MAX = 3600
"""Longest wait of --wait, over all attempts of the gateway to start a worker."""

DEFAULTS: dict[str, Any] = {
    "min": 0,
    "max": 3,
    "idle_timeout_s": 60,
    "concurrency": 30,
    "flashboot": True,
    "routing": "auto",
    "scaler": "QUEUE_DELAY",
    "scaler_value": 4,
    "execution_timeout_ms": 600_000,
}
"""Sent with every new endpoint, so that an endpoint does not change when a gateway's defaults do."""


KIND_DEFAULTS: dict[str, dict[str, Any]] = {
    "vllm": {},
    "queue": {},
    "load-balancer": {"scaler": "REQUEST_COUNT"},
}
"""Where a kind differs from that."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Kind(StrEnum):
    """What the workers of an endpoint are."""

    VLLM = "vllm"
    QUEUE = "queue"
    LOAD_BALANCER = "load-balancer"


class Scaler(StrEnum):
    """RunPod's two scaling rules (serverless-api.md §5.2)."""

    QUEUE_DELAY = "QUEUE_DELAY"
    REQUEST_COUNT = "REQUEST_COUNT"


class Routing(StrEnum):
    """How the worker of a request is chosen."""

    AUTO = "auto"
    LEAST_LOADED = "least_loaded"
    SESSION = "session"
    PREFIX = "prefix"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="pilotlight/ember (built in), a Hugging Face id, or a folder with a config.json.",
        show_default=False,
    ),
]
KindOption = Annotated[
    Kind | None,
    typer.Option(
        "--kind",
        case_sensitive=False,
        help="What workers are: vllm serves a MODEL, queue is a --command that takes jobs, load-balancer one"
        " that serves HTTP. Never changes.  [default: vllm]",
    ),
]
Command = Annotated[
    str | None,
    typer.Option(
        "--command",
        metavar="COMMAND",
        help="The program that a worker is, in one string; the program and its files are looked for here and"
        " stored with their absolute paths.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Memory reserved for a worker of a --command, such as 512M or 4G."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the endpoint; one that exists is revised.")]
Min = Annotated[int | None, typer.Option("--min", min=0, help="Workers kept although idle.  [default: 0]")]
Max = Annotated[int | None, typer.Option("--max", min=0, help="Most workers; 0 pauses.  [default: 3]")]
Idle = Annotated[
    int | None,
    typer.Option("--idle-timeout", min=1, help="Seconds without work before a worker ends.  [default: 60]"),
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="Requests that one worker serves at a time.  [default: 30]")
]
Flashboot = Annotated[
    bool | None,
    typer.Option("--flashboot/--no-flashboot", help="Keep the last workers frozen.  [default: flashboot]"),
]
RoutingPolicy = Annotated[
    Routing | None,
    typer.Option(
        "--routing",
        case_sensitive=False,
        help="How the worker of a request is chosen: by load, by session, by what it has cached of the"
        " prompt, or by whichever of these applies.  [default: auto]",
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="K=V",
        help="A worker's variable, such as MAX_MODEL_LEN=4096; K alone takes it from here. Repeatable.",
    ),
]
ScalerRule = Annotated[
    Scaler | None, typer.Option(case_sensitive=False, help="When to add workers.  [default: QUEUE_DELAY]")
]
ScalerValue = Annotated[
    float | None, typer.Option(min=0, help="Seconds of queue delay, or requests per worker.  [default: 4]")
]
ExecutionTimeout = Annotated[
    int | None, typer.Option(min=5, max=604_800, help="Seconds that one job may run.  [default: 600]")
]
GpuCount = Annotated[
    int | None,
    typer.Option("--gpu-count", "--gpus", min=0, help="GPUs per worker.  [default: decided by the gateway]"),
]
Wait = Annotated[bool, typer.Option("--wait", help="Start a worker and return when it is ready.")]
EngineUrl = Annotated[
    str | None,
    typer.Option(
        "--engine-url", metavar="URL", help="A running OpenAI server to use instead of own workers."
    ),
]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        "--engine-version", metavar="V", help="Which of the installed engines.  [default: the usual]"
    ),
]


def deploy_command(
    model: Model = None,
    kind: KindOption = None,
    command: Command = None,
    name: Name = None,
    min_: Min = None,
    max_: Max = None,
    idle_timeout: Idle = None,
    concurrency: Concurrency = None,
    flashboot: Flashboot = None,
    routing: RoutingPolicy = None,
    env: Env = None,
    scaler: ScalerRule = None,
    scaler_value: ScalerValue = None,
    execution_timeout: ExecutionTimeout = None,
    gpu_count: GpuCount = None,
    memory: Memory = None,
    wait: Wait = False,
    engine_url: EngineUrl = None,
    engine_version: EngineVersion = None,
    image: ImageOption = None,
    volume: VolumeOption = None,
    shm_size: ShmOption = None,
    registry_user: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an endpoint of a model or a command, or revise one.

    Model, options and memory are checked and the weights are fetched before anything is stored. No worker
    starts until somebody asks, unless --wait or --min says so. With the --name of an endpoint that exists,
    that endpoint gets a new revision: what you do not name stays as it is, and --env replaces all variables.

    Examples:
      pilotlight deploy pilotlight/ember
      pilotlight deploy Qwen/Qwen3-0.6B --name qwen --max 2 --env MAX_MODEL_LEN=4096 --wait
      pilotlight deploy --engine-url http://10.0.0.5:8000 --name fixed
      pilotlight deploy --kind queue --command "python handler.py" --name resize
      pilotlight deploy --kind load-balancer --command "python server.py" --name api
      pilotlight deploy --kind queue --image ghcr.io/me/worker:1.2 --volume models:/runpod-volume
    """
    check_kind(kind, model=model, command=command, engine_url=engine_url, memory=memory, image=image)
    given = {
        "kind": None if kind is None else kind.value,
        **_container_fields(image, volume, shm_size, registry_user),
        "command": _command(command, image),
        "memory_bytes": None if memory is None else parse_size(memory),
        "model": None if model is None else resolve_model(model),
        "name": name,
        "min": min_,
        "max": max_,
        "idle_timeout_s": idle_timeout,
        "concurrency": concurrency,
        "flashboot": flashboot,
        "routing": None if routing is None else routing.value,
        "env": None if env is None else parse_env(env),
        "scaler": None if scaler is None else scaler.value,
        "scaler_value": scaler_value,
        "execution_timeout_ms": None if execution_timeout is None else execution_timeout * 1000,
        "gpu_count": gpu_count,
        "engine_url": engine_url,
        "engine_version": engine_version,
    }
    with connect() as client:
        endpoint, revised = _apply(client, _named(given), wait=wait)
        try:
            if wait:
                endpoint = _when_ready(client, endpoint)
        finally:
            # Whatever became of the first worker, the endpoint exists, and its id must not be lost.
            _print(endpoint, revised=revised, as_json=as_json)


def _named(given: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in given.items() if value is not None}


def _when_ready(client: PilotlightClient, endpoint: Endpoint) -> Endpoint:
    of_command = endpoint["kind"] in {Kind.QUEUE, Kind.LOAD_BALANCER}
    return (wait_command_ready if of_command else wait_ready)(client, endpoint)


def _container_fields(
    image: str | None, volumes: list[str] | None, shm_size: str | None, registry_user: str | None
) -> dict[str, Any]:
    return {
        "image": image,
        "volumes": None if volumes is None else [parse_volume(each) for each in volumes],
        "shm_bytes": None if shm_size is None else parse_size(shm_size, option="--shm-size"),
        "registry_user": registry_user,
        "registry_password": None if registry_user is None else registry_password(registry_user),
    }


def _command(text: str | None, image: str | None) -> list[str] | None:
    if text is None:
        return None
    return parse_command(text) if image is None else parse_arguments(text)


def _apply(client: PilotlightClient, spec: dict[str, Any], *, wait: bool) -> tuple[Endpoint, bool]:
    name = spec.get("name")
    namesakes = [one for one in client.endpoints() if one["name"] == name] if name is not None else []
    existing = match_endpoint(namesakes, str(name)) if namesakes else None
    if wait and spec.get("kind") in {Kind.QUEUE, Kind.LOAD_BALANCER}:
        _check_minimum(spec, existing)
    with Waiting() as waiting:
        waiting.say("checking")

        def on_progress(progress: Any) -> None:
            step = f"{progress.get('stage')} {progress.get('message')}"
            waiting.say(describe_progress(progress), step=step)

        if existing is None:
            defaults = DEFAULTS | KIND_DEFAULTS[spec.get("kind", "vllm")]
            endpoint = client.create_endpoint({**defaults, "env": {}, **spec}, on_progress=on_progress)
        else:
            changes = {field: value for field, value in spec.items() if field != "name"}
            endpoint = client.revise_endpoint(existing["id"], changes, on_progress=on_progress)
    if not endpoint.get("id"):
        raise GatewayError(f"{client.url} answered without the endpoint that it made")
    return endpoint, existing is not None


def _check_minimum(spec: dict[str, Any], existing: Endpoint | None) -> None:
    """Return when a worker is going to start without work, so that it can be waited for."""
    if not spec.get("min", existing["min"] if existing else 0):
        message = "workers of a command start when work comes; to wait for one, deploy with --min 1"
        raise typer.BadParameter(message, param_hint="--wait")


def wait_ready(client: PilotlightClient, endpoint: Endpoint) -> Endpoint:
    """The endpoint once a worker of it is ready.

    Raises:
        PilotlightError: Its worker cannot be started; the message has the cause and the advice.
    """
    began = time.monotonic()
    while True:
        try:
            with watch_start(client, endpoint["id"]):
                client.wake(endpoint["id"])
        except BusyError as error:
            now = client.endpoint(endpoint["id"])
            if failure := now.get("failure"):
                raise _cannot_start(now, failure) from error
            # The gateway holds a request for some minutes; a large model may need more than one such hold.
            if not now.get("workers", {}).get("starting") or time.monotonic() - began > WAIT_S_MAX:
                raise
            time.sleep(min(error.retry_after_s or 1.0, 5.0))
        else:
            note(f"ready after {duration(time.monotonic() - began)}")
            return client.endpoint(endpoint["id"])


def wait_command_ready(client: PilotlightClient, endpoint: Endpoint) -> Endpoint:
    """The endpoint of a command once a worker of its latest revision is ready.

    One starts only because of a minimum, and workers of an earlier revision may still be ready.

    Raises:
        PilotlightError: It cannot start; the message has the cause and the advice.
    """
    began = time.monotonic()
    with watch_start(client, endpoint["id"]):
        while True:
            now = client.endpoint(endpoint["id"])
            if now["status"] == "ready" and _has_ready(client, now):
                break
            if failure := now.get("failure"):
                raise _cannot_start(now, failure)
            if time.monotonic() - began > WAIT_S_MAX:
                raise PilotlightError(f"{now['name']} has no ready worker after {duration(WAIT_S_MAX)}")
            time.sleep(0.2)
    note(f"ready after {duration(time.monotonic() - began)}")
    return now


def _has_ready(client: PilotlightClient, endpoint: Endpoint) -> bool:
    return any(
        worker["state"] == "ready" and worker["stage"] == "ready" and worker["version"] == endpoint["version"]
        for worker in client.workers(endpoint["id"])
    )


def _cannot_start(endpoint: Endpoint, failure: Failure) -> PilotlightError:
    return PilotlightError(f"{endpoint['name']} cannot start: {describe_failure(failure)}")


def check_kind(
    kind: Kind | None,
    *,
    model: str | None,
    command: str | None,
    engine_url: str | None,
    memory: str | None,
    image: str | None = None,
) -> None:
    """Return when the options say what the workers are.

    Raises:
        typer.BadParameter: Something is missing or belongs to another kind.
    """
    if kind in {None, Kind.VLLM}:
        if command is not None:
            message = "belongs to --kind queue or --kind load-balancer; name the kind"
            raise typer.BadParameter(message, param_hint="--command")
        if memory is not None and image is None:
            message = "belongs to --kind queue or --kind load-balancer; a model's need is computed"
            raise typer.BadParameter(message, param_hint="--memory")
        if image is not None and engine_url is not None:
            raise typer.BadParameter("has no place beside --image", param_hint="--engine-url")
        if model is None and engine_url is None and image is None:
            message = "give a MODEL, the --engine-url of a running server, or a --kind with its --command"
            raise typer.BadParameter(message, param_hint="MODEL")
        return
    if model is not None or engine_url is not None:
        message = f"--kind {kind} takes a --command instead"
        raise typer.BadParameter(message, param_hint="MODEL" if model is not None else "--engine-url")
    if command is None and image is None:
        message = f'--kind {kind} needs it or an --image, such as --command "python handler.py"'
        raise typer.BadParameter(message, param_hint="--command")


def parse_command(text: str) -> list[str]:
    """Program and arguments, with absolute paths for the program and for files that exist here.

    A worker begins in an empty folder of its own and has the gateway's PATH, so what is meant here must be
    named so that it means the same there.

    Raises:
        typer.BadParameter: It is empty, has a quote that nothing closes, or runs a script that is not here.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {error}", param_hint="--command") from error
    if not words:
        raise typer.BadParameter("names no program", param_hint="--command")
    program = Path(words[0]).expanduser()
    found = str(program) if "/" in words[0] else shutil.which(words[0])
    script = next(iter(words[1:2]), "")
    if Path(script).suffix == ".py" and not Path(script).expanduser().is_file():
        raise typer.BadParameter(f"there is no file {script!r} here", param_hint="--command")
    resolved = [os.path.abspath(found) if found else words[0]]  # noqa: PTH100 - links stay, a venv is one
    for word in words[1:]:
        here = not word.startswith("-") and Path(word).expanduser().is_file()
        resolved.append(str(Path(word).expanduser().absolute()) if here else word)
    if resolved != words:
        note(f"workers run: {shlex.join(resolved)}")
    return resolved


def parse_size(text: str, *, option: str = "--memory") -> int:
    """Bytes of a size such as 512M or 4GiB; a number alone is bytes.

    Raises:
        typer.BadParameter: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if found is None or not float(found[1]):
        message = f"{text!r} is no size; write 512M, 4G, or a number of bytes"
        raise typer.BadParameter(message, param_hint=option)
    return int(float(found[1]) * _UNITS[found[2]])


def resolve_model(text: str) -> str:
    """The model as the gateway wants it: folders as absolute paths, ids as they are."""
    if text.startswith((".", "/", "~")) or (
        not text.startswith("pilotlight/") and Path(text, "config.json").is_file()
    ):
        return str(Path(text).expanduser().resolve())
    return text


def parse_env(items: list[str]) -> dict[str, str]:
    """Variables by name; `NAME` alone takes the value from our own environment, away from the process list.

    Raises:
        typer.BadParameter: A name that no variable can have, or one that is not set here.
    """
    values: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            message = f"{name!r} is not the name of a variable; write NAME=VALUE or NAME"
            raise typer.BadParameter(message, param_hint="--env")
        if not equals:
            if name not in os.environ:
                message = f"{name} has no value: it is not set here; write {name}=VALUE"
                raise typer.BadParameter(message, param_hint="--env")
            value = os.environ[name]
        values[name] = value
    return values


def _print(endpoint: Endpoint, *, revised: bool, as_json: bool) -> None:
    name, version = endpoint["name"], endpoint.get("version", 1)
    if revised:
        note(f"revision {version} of {name}")
    if as_json:
        print_json(endpoint)
        return
    if endpoint.get("kind") in {Kind.QUEUE, Kind.LOAD_BALANCER}:
        write(_command_text(endpoint))
        return
    model = next(iter(endpoint.get("served_names") or [endpoint.get("model", "")]))
    url = endpoint.get("openai_url", "")
    write(
        f"{name} is deployed (revision {version}, {endpoint.get('status', 'unknown')})\n"
        f"  id      {endpoint['id']}\n"
        f"  model   {endpoint.get('model') or endpoint.get('engine_url')}\n"
        f"  OpenAI  {url}\n"
        "\n"
        f"curl {url}/chat/completions \\\n"
        '  -H "Authorization: Bearer $PILOTLIGHT_API_KEY" -H "Content-Type: application/json" \\\n'
        f"""  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'\n"""
        "\n"
        "Next:\n"
        f'  pilotlight chat {name} "Hello"            talk to it\n'
        f"  pilotlight keys create --endpoint {name}  a key for its callers\n"
        f"  pilotlight ps {name}                      its workers\n"
    )


def _command_text(endpoint: Endpoint) -> str:
    name, url, key = endpoint["name"], endpoint["url"], '-H "Authorization: Bearer $PILOTLIGHT_API_KEY"'
    image = f"  image    {endpoint['image']}\n" if endpoint.get("image") else ""
    if endpoint["kind"] == Kind.QUEUE:
        example = (
            f"curl {url}/runsync \\\n"
            f'  {key} -H "Content-Type: application/json" \\\n'
            """  -d '{"input": {}}'\n"""
        )
        first = f"  pilotlight run {name} '{{}}'                  a job\n"
    else:
        example = f"curl {url}/ {key}\n"
        first = ""
    return (
        f"{name} is deployed (revision {endpoint['version']}, {endpoint['status']})\n"
        f"  id       {endpoint['id']}\n"
        f"  kind     {endpoint['kind']}\n"
        f"{image}  command  {shlex.join(endpoint['command']) or 'that of the image'}\n"
        f"  URL      {url}\n"
        f"\n{example}\n"
        f"Next:\n{first}"
        f"  pilotlight keys create --endpoint {name}  a key for its callers\n"
        f"  pilotlight ps {name}                      its workers\n"
        f"  pilotlight logs {name}                    what they print\n"
    )
