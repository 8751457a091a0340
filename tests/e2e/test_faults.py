"""Bad input and faults of engines and workers, as callers and owners of a real installation meet them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess

import pytest

OOM = "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"
CHAT = "openai/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "four five"}]


def openai_error(answer, status):
    """The error of an OpenAI route, after checking its shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "code"}
    return error["message"]


def native_error(answer, status):
    """The error of a job route, after checking its shape (serverless-api.md §2.3)."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert isinstance(body["error"], str)
    return body["error"]


def problem(answer, status):
    """The error of a management route (RFC 9457), after checking its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["status"] == status
    assert body["title"]
    return body["detail"] + " ".join(body.get("errors") or [])


# 1. Input.


def test_bad_input(shared, tmp_path):
    """Every kind of bad input gets its status and a body in the shape of its road; nothing is started by it."""
    api = shared.api
    endpoint = shared.deploy(max=0)
    path = f"/v2/{endpoint.id}"
    body = {"model": "pilotlight/ember", "messages": MESSAGES}

    assert "endpoint not found" in openai_error(api.post(f"/v2/nosuchendpoint/{CHAT}", json=body), 404)
    assert "endpoint not found" in native_error(api.post("/v2/nosuchendpoint/run", json={"input": {}}), 404)
    problem(api.get("/pilotlight/v1/endpoints/nosuchendpoint"), 404)
    assert native_error(endpoint.get("status/nosuchjob"), 404) == "job not found"

    for headers in (
        {"Authorization": ""},
        {"Authorization": "Bearer rpa_WRONG"},
        {"Authorization": "Basic x"},
    ):
        assert "key" in openai_error(api.post(f"{path}/{CHAT}", json=body, headers=headers), 401)
        native_error(api.post(f"{path}/run", json={"input": {}}, headers=headers), 401)
        problem(api.get("/pilotlight/v1/endpoints", headers=headers), 401)

    other = shared.deploy(max=0)
    made = api.post("/pilotlight/v1/keys", json={"name": "run", "scope": "run", "endpoints": [endpoint.id]})
    assert made.status_code == 201, made.text
    run_only = {"Authorization": f"Bearer {made.json()['key']}"}
    assert api.post(f"{path}/run", json={"input": {"prompt": "x"}}, headers=run_only).status_code == 200
    native_error(api.post(f"/v2/{other.id}/run", json={"input": {}}, headers=run_only), 403)
    openai_error(api.post(f"/v2/{other.id}/{CHAT}", json=body, headers=run_only), 403)
    problem(api.get("/pilotlight/v1/endpoints", headers=run_only), 403)

    for broken in (b"{", b"", b"[1, 2]", b'"text"', b'{"input": {"prompt": "x"}', b"\xff\xfe{}"):
        native_error(api.post(f"{path}/run", content=broken), 400)
        answer = api.post("/pilotlight/v1/endpoints", content=broken)
        assert answer.status_code in {400, 422}
        problem(answer, answer.status_code)
    for broken in (b"{", b"[1, 2]", b'"text"', b'{"messages": ['):
        openai_error(api.post(f"{path}/{CHAT}", content=broken), 400)
    for missing in ({"inputs": {"prompt": "x"}}, {"prompt": "x"}):
        assert "input" in native_error(endpoint.post("run", **missing), 400)
        assert "input" in native_error(endpoint.post("runsync", **missing), 400)

    openai_error(api.post(f"{path}/openai/sleep"), 403)
    openai_error(api.post(f"{path}/openai/v1/load_lora_adapter", json={}), 403)
    openai_error(api.get(f"{path}/{CHAT}"), 405)
    assert shared.processes() == {}


def test_bad_models_are_refused_before_anything_starts(shared, tmp_path):
    """An endpoint that could never serve is not made: unknown folder, architecture, flag, value."""
    api = shared.api

    def deploy(**body):
        return api.post("/pilotlight/v1/endpoints", json=body)

    missing = tmp_path / "no-such-model"
    assert str(missing) in problem(deploy(model=str(missing)), 422)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(
        json.dumps({"architectures": ["NobodyKnowsThisModel"], "model_type": "x"})
    )
    (strange / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    text = problem(deploy(model=str(strange)), 422)
    assert "NobodyKnowsThisModel" in text
    text = problem(deploy(model="pilotlight/ember", env={"MAX_MODEL_LEN": "1000000"}), 422)
    assert "MAX_MODEL_LEN" in text
    assert "2048" in text
    text = problem(deploy(model="pilotlight/ember", env={"DTYPE": "float1"}), 422)
    assert "DTYPE" in text
    assert "bfloat16" in text
    text = problem(deploy(model="pilotlight/ember", env={"ENFORCE_EAGER": "perhaps"}), 422)
    assert "ENFORCE_EAGER" in text
    text = problem(deploy(model="pilotlight/ember", min=2, max=1), 422)
    assert "min" in text
    answer = deploy(model="pilotlight/nothing")
    assert answer.status_code in {422, 503}, "503 where no hub can be asked"
    assert "pilotlight/nothing" in problem(answer, answer.status_code)
    assert api.get("/pilotlight/v1/endpoints").json() == {"endpoints": []}
    assert shared.processes() == {}


def test_inputs_that_only_the_worker_can_judge(shared):
    """Neither prompt nor messages fails the job; with both, messages win; a context too long is the engine's no."""
    endpoint = shared.deploy()
    # A body without any input is an empty one: the Go client leaves it out (serverless-api.md §2.3).
    for body in ({"input": {"temperature": 1}}, {"input": {}}, {}):
        neither = endpoint.result(endpoint.post("run", **body).json()["id"])
        assert neither["status"] == "FAILED"
        assert "prompt" in neither["error"]
        assert "messages" in neither["error"]
    both = endpoint.post("runsync", input={"prompt": "not me", "messages": MESSAGES}).json()
    assert both["status"] == "COMPLETED"
    assert "four five" in json.dumps(both["output"]) or "fourfive" in json.dumps(both["output"])
    assert "not me" not in json.dumps(both["output"])
    assert "max_model_len" in openai_error(endpoint.chat("x", max_tokens=100_000), 400)
    long = endpoint.post("runsync", input={"prompt": "x", "sampling_params": {"max_tokens": 100_000}}).json()
    assert long["status"] == "FAILED"
    assert "max_model_len" in long["error"]
    assert "does not exist" in openai_error(endpoint.post(CHAT, model="another", messages=MESSAGES), 404)


# 2. Engines that fail.


def test_an_engine_that_cannot_start(shared, tools):
    """1. Three starts fail. 2. The endpoint is unhealthy and says why in the engine's own words; held callers
    get 503 with the cause. 3. Later callers get it at once, and no further start is tried. 4. A revision with a
    mended environment works at once; the job that waited is run."""
    endpoint = shared.deploy({"FAKE_ENGINE_FAIL_TEXT": OOM})
    job = endpoint.run("count to 2")
    held = shared.background(lambda: endpoint.chat("x"))
    answer = held.result()
    message = openai_error(answer, 503)
    assert "can't allocate memory" in message
    assert 1 <= int(answer.headers["retry-after"]) <= 30

    view = endpoint.view()
    assert view["status"] == "unhealthy"
    assert view["failure"]["kind"] == "out_of_memory"
    assert view["failure"]["cause"] == OOM
    assert view["failure"]["advice"]
    assert view["retry_at"]
    assert [start["outcome"] for start in endpoint.starts()] == ["failed"] * 3
    assert endpoint.health()["workers"]["unhealthy"] == 3

    for _ in range(3):
        answer = endpoint.chat("x")
        assert "can't allocate memory" in openai_error(answer, 503)
        assert int(answer.headers["retry-after"]) >= 1
    assert len(endpoint.happenings("start")) == 3, "nobody tried again meanwhile"
    assert endpoint.job(job)["status"] == "IN_QUEUE"
    assert shared.processes() == {}

    endpoint.revise(env={"FAKE_ENGINE_RECORD": str(endpoint.record)})
    answer = endpoint.chat("one two")
    assert answer.status_code == 200, answer.text
    assert endpoint.result(job)["status"] == "COMPLETED"
    tools.until(lambda: endpoint.view()["status"] == "ready", "it is healthy")
    assert endpoint.view()["failure"] is None


def test_an_engine_that_dies_while_starting_by_a_signal(shared, tools, tmp_path):
    """It is started again, and the caller never learns of it."""
    gate = tmp_path / "loaded"
    endpoint = shared.deploy({"FAKE_ENGINE_LOAD_FILE": str(gate)})
    held = shared.background(lambda: endpoint.chat("x"))
    shared.signal(endpoint.engine_pid(1), signal.SIGKILL)
    endpoint.engine_pid(2)
    gate.touch()
    assert held.result().status_code == 200
    failed = endpoint.starts()[-1]
    assert failed["outcome"] == "failed"
    tools.until(lambda: len(set(shared.processes().values())) == 1, "one worker lives")


def test_an_engine_killed_in_mid_stream(shared, tools, tmp_path):
    """1. The stream ends with an error event, and what is not streamed in 502. 2. Jobs are run again, once, by a
    new worker; the stream of one whose chunks were read begins anew (worker-protocol.md §7.2). 3. The next request
    is answered."""
    hold = tmp_path / "go-on"
    holds = {"FAKE_ENGINE_HOLD_FILE": str(hold), "FAKE_ENGINE_HOLD_WHOLE_FILE": str(hold)}
    endpoint = shared.deploy(holds, max=1)
    read = endpoint.run("count to 3", stream=True)
    endpoint.first_chunks(read)
    unread = endpoint.run("count to 4", stream=True)
    whole = endpoint.run("count to 5")
    with endpoint.stream("count to 6") as events:
        next(events)
        tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 4, "all are running")
        first = endpoint.ready()["id"]
        unstreamed = shared.background(lambda: endpoint.chat("count to 8"))
        tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 5, "one that is not streamed, too")
        shared.signal(endpoint.engine_pid(), signal.SIGKILL)
        last = json.loads(list(events)[-1])
    assert last["error"]["message"]
    assert openai_error(unstreamed.result(), 502)
    hold.touch()
    for job_id in (read, unread, whole):
        done = endpoint.result(job_id)
        assert (done["status"], done["retries"]) == ("COMPLETED", 1), done
        assert done["workerId"] != first
    assert endpoint.rest_of_stream(read) == "1 2 3"
    assert endpoint.chat("six seven").status_code == 200
    rows = {row["id"]: row for row in endpoint.requests(6)}
    assert rows[read]["outcome"] == "ok"
    assert rows[unread]["outcome"] == "ok"
    cut = {
        row["status"]: row for row in rows.values() if row["road"] == "data" and row["outcome"] == "failed"
    }
    assert set(cut) == {200, 502}
    assert cut[200]["estimated"]


def test_a_worker_program_killed(shared, tools, tmp_path):
    """1. Its engine, which leads a session of its own, is gone with it. 2. Its job is run again by another.
    3. A job that loses its worker a second time FAILs."""
    hold = tmp_path / "go-on"
    endpoint = shared.deploy({"FAKE_ENGINE_HOLD_FILE": str(hold)}, max=1)
    job = endpoint.run("count to 4", stream=True)
    ends = []
    for turn in (1, 2):
        engine = endpoint.engine_pid(turn)
        tools.until(lambda turn=turn: len(generations(endpoint)) == turn, f"attempt {turn} runs")
        worker = endpoint.ready()
        ends.append(worker["id"])
        shared.signal(worker["pid"], signal.SIGKILL)
        tools.wait_dead(engine)
    done = endpoint.result(job)
    assert (done["status"], done["retries"]) == ("FAILED", 1), done
    assert len(set(ends)) == 2
    tools.until(lambda: not shared.processes(), "nothing is started for a job that has ended")
    assert endpoint.health()["jobs"]["retried"] == 1


def test_a_worker_that_ignores_sigterm(make_installation, tools):
    """A program that hangs and an engine that ignores SIGTERM are killed when the grace is over."""
    installation = make_installation(PILOTLIGHT_WORKERS__STOP_GRACE_S="1").start()
    stray = installation.root / "stray"
    env = {"FAKE_ENGINE_IGNORE_SIGTERM": "1", "FAKE_ENGINE_STRAY_FILE": str(stray)}
    endpoint = installation.deploy(env, idle_timeout_s=1)
    assert endpoint.chat("x").status_code == 200
    worker = endpoint.ready()
    assert len(installation.processes()) == 3
    installation.signal(worker["pid"], signal.SIGSTOP)
    tools.wait_dead(worker["pid"])
    tools.until(lambda: not installation.processes(), "engine and stray child are gone")
    tools.until(lambda: not endpoint.workers(), "the fleet knows")
    assert endpoint.starts()[0]["outcome"] == "ready"
    assert endpoint.view()["failure"] is None, "an end on purpose is no crash"
    assert endpoint.chat("again").status_code == 200


def test_a_worker_program_that_hangs(make_installation, tools):
    """1. A worker program stands still with a job in hand; its engine still answers. 2. Neither heartbeats nor
    stop polls come: it is ended, and the job runs elsewhere. 3. This counts as a crash."""
    installation = make_installation(
        PILOTLIGHT_JOBS__PING_INTERVAL_MS="1000", PILOTLIGHT_JOBS__STOP_HOLD_S="1"
    ).start()
    hold = installation.root / "go-on"
    endpoint = installation.deploy({"FAKE_ENGINE_HOLD_FILE": str(hold)}, max=1)
    job = endpoint.run("count to 3", stream=True)
    tools.until(lambda: generations(endpoint), "it runs")
    hung = endpoint.ready()
    installation.signal(hung["pid"], signal.SIGSTOP)
    tools.wait_dead(hung["pid"])
    hold.touch()
    done = endpoint.result(job)
    assert (done["status"], done["retries"]) == ("COMPLETED", 1), done
    assert done["workerId"] != hung["id"]
    assert installation.interrupt() == 0
    failures = dict(installation.table("SELECT id, failure FROM workers"))
    assert json.loads(failures[hung["id"]])["kind"] == "hung"


def test_a_worker_whose_gateway_is_gone_for_good_ends_itself(installation, tools):
    """Settings of the endpoint say how long a worker stays without a gateway (vllm-worker.md §4.9)."""
    endpoint = installation.deploy({"PLATFORM_LOST_TIMEOUT": "1"})
    assert endpoint.chat("x").status_code == 200
    pids = list(installation.processes())
    assert len(pids) == 2
    installation.crash()
    for pid in pids:
        tools.wait_dead(pid)
    assert installation.processes() == {}
    assert list(installation.sockets.rglob("*.sock")) == []


def test_a_start_that_hangs(make_installation, tools):
    """A start without any sign of life is ended, and its callers are told the stage in which it stood still."""
    installation = make_installation(
        PILOTLIGHT_WORKERS__START_TIMEOUT_S="1", PILOTLIGHT_WORKERS__START_FAILURES_MAX="1"
    ).start()
    endpoint = installation.deploy({"FAKE_ENGINE_LOAD_FILE": str(installation.root / "never")})
    message = openai_error(endpoint.chat("x"), 503)
    assert "no progress for 1 s in stage" in message
    assert endpoint.view()["failure"]["kind"] == "timeout"
    tools.until(lambda: not installation.processes(), "it is gone")


def generations(endpoint):
    return [entry for entry in endpoint.happenings("request") if "count to" in str(entry["body"])]


# 3. A gateway that cannot start.


def refused(installation, **settings):
    """The message of a gateway that does not start."""
    process = installation.spawn(**settings)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    log = installation.log.read_text()
    assert "Traceback" not in log
    # A gateway that runs may write there, too.
    *_, said = [line for line in log.splitlines() if line.startswith('{"error": ')]
    return json.loads(said)["error"]


def test_a_second_gateway_on_the_same_folder(shared):
    """It names the first one's pid and leaves it alone."""
    port, shared.port = shared.port, 0
    message = refused(shared)
    shared.port = port
    assert f"pid {shared.pid}" in message
    assert str(shared.home) in message
    assert shared.api.get("/pilotlight/v1/status").status_code == 200


def test_a_port_in_use(make_installation):
    installation = make_installation()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        installation.port = taken.getsockname()[1]
        message = refused(installation)
    assert f"port {installation.port}" in message
    assert "in use" in message
    # The folder is free again: the same command works once the port is.
    installation.start()


def test_folders_and_databases_that_cannot_be_used(make_installation):
    """A data folder that is a file or cannot be made, a database that is none or comes from the future."""
    installation = make_installation()
    file = installation.root / "file"
    file.write_text("x")
    assert f"{file} is not writable" in refused(installation, PILOTLIGHT_HOME=str(file))
    assert "/proc/pilotlight is not writable" in refused(installation, PILOTLIGHT_HOME="/proc/pilotlight")

    broken = installation.root / "broken"
    broken.mkdir()
    (broken / "pilotlight.db").write_bytes(b"this is no database at all, however long one looks at it" * 20)
    assert "not a database" in refused(installation, PILOTLIGHT_HOME=str(broken))

    newer = installation.root / "newer"
    newer.mkdir()
    with contextlib.closing(sqlite3.connect(newer / "pilotlight.db")) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('9999')")
    before = (newer / "pilotlight.db").read_bytes()
    message = refused(installation, PILOTLIGHT_HOME=str(newer))
    assert "newer version" in message
    assert "9999" in message
    assert (newer / "pilotlight.db").read_bytes()[:16] == before[:16]
    assert "PORT" in refused(installation, PILOTLIGHT_SERVER__PORT="many").upper()
    assert installation.processes() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_data_folder_of_somebody_else(make_installation):
    installation = make_installation()
    folder = installation.root / "mine"
    folder.mkdir(mode=0o700)
    installation.root.chmod(0o755)
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    probe = [*nobody, installation.process_command[0], "--version"]
    if subprocess.run(probe, capture_output=True, check=False, cwd="/").returncode:
        pytest.skip("the program cannot be read by other users here")
    command = [*nobody, *installation.process_command, "--port", "0"]
    environment = installation.environment | {"PILOTLIGHT_HOME": str(folder)}
    for mode, reason in ((0o700, "cannot be read"), (0o755, "is not writable")):
        folder.chmod(mode)
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False, cwd="/"
        )
        assert (result.returncode, result.stdout) == (1, ""), result.stderr
        message = json.loads(result.stderr)["error"]
        assert str(folder) in message
        assert reason in message
