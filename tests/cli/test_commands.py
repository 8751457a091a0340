"""The commands against a stub gateway, in this process: what they send, print and return."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotlight.cli.progress import describe_start

JOB = "0b9b1c2d-u1"
WORKER = "wrk1aaaaaaaaaa"


def test_ls_prints_the_gateways_objects_as_json(cli, gateway):
    gateway.add("alpha")
    gateway.add("beta")
    result = cli("ls", "--json")
    assert result.exit_code == 0
    assert [one["name"] for one in json.loads(result.stdout)] == ["alpha", "beta"]
    assert result.stderr == ""


def test_ls_for_people_shows_names_and_why_an_endpoint_cannot_start(cli, gateway):
    failure = {"kind": "out_of_memory", "cause": "no memory", "advice": "Use a smaller model."}
    gateway.add("sick [bold]", status="unhealthy", failure=failure)
    result = cli("ls")
    assert "sick [bold]" in result.stdout
    assert "unhealthy" in result.stdout
    assert "no memory. Use a smaller model." in result.stderr


def test_ls_without_endpoints_says_what_to_do_and_prints_an_empty_array(cli):
    assert "pilotlight deploy" in cli("ls").stderr
    assert json.loads(cli("ls", "--json").stdout) == []


def test_deploy_sends_every_default_explicitly(cli, gateway):
    result = cli("deploy", "pilotlight/ember", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["id"]
    (sent,) = gateway.sent("POST", "/pilotlight/v1/endpoints")
    assert sent.body == {
        "model": "pilotlight/ember",
        "min": 0,
        "max": 3,
        "idle_timeout_s": 60,
        "concurrency": 30,
        "flashboot": True,
        "routing": "auto",
        "scaler": "QUEUE_DELAY",
        "scaler_value": 4,
        "execution_timeout_ms": 600_000,
        "env": {},
    }


def test_deploy_sends_what_the_user_named(cli, gateway, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    options = "--name q --min 1 --max 2 --idle-timeout 5 --concurrency 8 --no-flashboot --routing prefix --scaler request_count"
    options += " --scaler-value 3 --execution-timeout 60 --gpu-count 2 --env MAX_MODEL_LEN=4096 --env A=b=c --env HF_TOKEN"
    result = cli("deploy", "org/model", *options.split())
    assert result.exit_code == 0, result.stderr
    (sent,) = gateway.sent("POST", "/pilotlight/v1/endpoints")
    assert sent.body == {
        "model": "org/model",
        "name": "q",
        "min": 1,
        "max": 2,
        "idle_timeout_s": 5,
        "concurrency": 8,
        "flashboot": False,
        "routing": "prefix",
        "scaler": "REQUEST_COUNT",
        "scaler_value": 3.0,
        "execution_timeout_ms": 60_000,
        "gpu_count": 2,
        "env": {"MAX_MODEL_LEN": "4096", "A": "b=c", "HF_TOKEN": "hf_secret"},
    }
    assert "hf_secret" not in result.output


def test_deploy_prints_id_url_curl_and_next_commands_but_no_key(cli, gateway):
    result = cli("deploy", "pilotlight/ember", "--name", "ember")
    (endpoint,) = gateway.endpoints.values()
    for text in (
        endpoint["id"],
        endpoint["openai_url"],
        "curl ",
        "$PILOTLIGHT_API_KEY",
        "pilotlight chat ember",
    ):
        assert text in result.stdout
    assert "rpa_" not in result.output


def test_deploy_with_a_name_that_exists_revises_with_only_what_was_named(cli, gateway):
    endpoint = gateway.add("ember", max=9)
    result = cli("deploy", "org/other", "--name", "ember", "--json")
    assert json.loads(result.stdout)["version"] == 2
    assert "revision 2 of ember" in result.stderr
    (sent,) = gateway.sent("PATCH", f"/pilotlight/v1/endpoints/{endpoint['id']}")
    assert sent.body == {"model": "org/other"}
    assert not gateway.sent("POST", "/pilotlight/v1/endpoints")


def test_deploy_of_a_fixed_engine_needs_no_model(cli, gateway):
    result = cli("deploy", "--engine-url", "http://10.0.0.5:8000", "--name", "fixed")
    assert result.exit_code == 0, result.output
    (sent,) = gateway.sent("POST", "/pilotlight/v1/endpoints")
    assert sent.body["engine_url"] == "http://10.0.0.5:8000"
    assert "model" not in sent.body


def test_deploy_makes_relative_folders_absolute(cli, gateway, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/config.json").write_text("{}")
    cli("deploy", "mine")
    cli("deploy", "./other", "--name", "o")
    models = [one.body["model"] for one in gateway.sent("POST", "/pilotlight/v1/endpoints")]
    assert models == [str(tmp_path / "mine"), str(tmp_path / "other")]


def test_deploy_shows_progress_on_stderr(cli, gateway):
    gateway.progress = [
        {"stage": "checking", "message": "flags", "done": None, "total": None},
        {"stage": "downloading", "message": "model.safetensors", "done": 500_000, "total": 1_000_000},
    ]
    result = cli("deploy", "org/model", "--json")
    assert "downloading: model.safetensors: 500.0 kB of 1.0 MB (50 %)" in result.stderr
    assert "checking: flags" in result.stderr
    json.loads(result.stdout)


def test_deploy_that_fails_after_its_answer_began_ends_with_the_gateways_reason(cli, gateway):
    gateway.deploy_error = {
        "status": 422,
        "title": "Unprocessable Entity",
        "detail": "unknown architecture FooLM",
    }
    result = cli("deploy", "org/model", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert json.loads(result.stderr.splitlines()[-1]) == {"error": "unknown architecture FooLM"}


def test_deploy_wait_shows_the_stage_and_prints_the_ready_endpoint(cli, gateway, a_worker):
    gateway.chat_waits_for_polls = 2
    endpoint = gateway.add("ember")
    gateway.workers[endpoint["id"]] = [a_worker("starting", "loading_weights")]
    result = cli("deploy", "org/x", "--name", "ember", "--wait", "--json")
    assert result.exit_code == 0, result.stderr
    assert "starting: loading weights" in result.stderr
    assert "ready after" in result.stderr
    assert json.loads(result.stdout)["id"] == endpoint["id"]


def test_deploy_wait_goes_on_while_a_slow_start_outlives_one_hold(cli, gateway):
    gateway.wake_statuses = [503, 503, 200]
    endpoint = gateway.add("ember", workers={"starting": 1})
    result = cli("deploy", "org/x", "--name", "ember", "--wait", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(gateway.sent("GET", f"/v2/{endpoint['id']}/openai/health")) == 3


def test_deploy_wait_that_fails_still_prints_the_endpoint_and_gives_cause_and_advice(cli, gateway):
    gateway.wake_statuses = [503]
    failure = {
        "kind": "out_of_memory",
        "cause": "no memory for the KV cache",
        "advice": "Lower MAX_MODEL_LEN.",
    }
    gateway.add("ember", status="unhealthy", failure=failure)
    result = cli("deploy", "org/x", "--name", "ember", "--wait", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["name"] == "ember"
    error = json.loads(result.stderr.splitlines()[-1])["error"]
    assert error == "ember cannot start: no memory for the KV cache. Lower MAX_MODEL_LEN. [out_of_memory]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["deploy"],
        ["deploy", "m", "--min", "-1"],
        ["deploy", "m", "--env", "9X=1"],
        ["deploy", "m", "--env", "SURELY_NOT_SET_HERE"],
        ["scale", "alpha"],
        ["rm", "alpha"],
        ["keys", "create", "--scope", "run"],
        ["keys", "create", "--heartbeat", "0.5"],
        ["keys", "create", "--heartbeat", "61"],
        ["keys", "create", "--scope", "admin", "--endpoint", "alpha"],
        ["run", "alpha", "{not json"],
        ["run", "alpha", "@/no/such/file"],
        ["run", "alpha", "{}", "--sync", "--stream"],
        ["usage", "--since", "yesterday"],
        ["chat", "alpha", "  "],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage_ends_with_2_and_sends_nothing_that_changes(cli, gateway, arguments):
    gateway.add("alpha")
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert all(one.method == "GET" for one in gateway.requests)


def test_wrong_usage_with_json_is_json_too(cli):
    result = cli("run", "alpha", "{", "--json")
    assert result.exit_code == 2
    assert "not JSON" in json.loads(result.stderr)["error"]


def test_ps_uses_our_word_for_the_state(cli, gateway, a_worker):
    endpoint = gateway.add("alpha")
    gateway.workers[endpoint["id"]] = [a_worker("starting", "importing")]
    (shown,) = json.loads(cli("ps", "--json").stdout)
    assert (shown["id"], shown["status"], shown["runpod_status"]) == (WORKER, "starting", "IDLE")
    assert (shown["endpoint_id"], shown["endpoint_name"]) == (endpoint["id"], "alpha")
    table = cli("ps", "alpha").stdout
    assert "starting" in table
    assert "1/30" in table


def test_scale_sends_only_what_was_named(cli, gateway):
    endpoint = gateway.add("alpha")
    result = cli("scale", "alpha", "--max", "0", "--json")
    assert json.loads(result.stdout)["max"] == 0
    (sent,) = gateway.sent("PATCH", f"/pilotlight/v1/endpoints/{endpoint['id']}")
    assert sent.body == {"max": 0}


def test_rm_asks_nothing_with_yes(cli, gateway):
    endpoint = gateway.add("alpha")
    result = cli("rm", "alpha", "--yes", "--json")
    assert json.loads(result.stdout) == {"id": endpoint["id"], "name": "alpha", "deleted": True}
    assert not gateway.endpoints


def test_an_unknown_endpoint_is_an_error_that_lists_candidates_nearest_first(cli, gateway):
    for name in ("zebra", "alpha", "beta"):
        gateway.add(name)
    result = cli("run", "betta", "{}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no endpoint 'betta'; there are: beta (")


def test_a_name_that_two_endpoints_have_is_an_error_that_lists_both(cli, gateway):
    ids = [gateway.add("twin")["id"], gateway.add("twin")["id"]]
    result = cli("rm", "twin", "--yes")
    assert result.exit_code == 1
    assert all(one in result.stderr for one in ids)
    assert len(gateway.endpoints) == 2


def test_keys_create_prints_the_key_alone_on_stdout(cli, gateway):
    endpoint = gateway.add("alpha")
    result = cli("keys", "create", "web", "--endpoint", "alpha")
    assert result.stdout == "rpa_new0secret\n"
    (sent,) = gateway.sent("POST", "/pilotlight/v1/keys")
    assert sent.body == {"name": "web", "scope": "run", "endpoints": [endpoint["id"]]}


def test_keys_create_without_endpoints_makes_an_admin_key(cli, gateway):
    assert json.loads(cli("keys", "create", "ops", "--json").stdout)["key"] == "rpa_new0secret"
    assert gateway.keys[0]["scope"] == "admin"


def test_keys_create_asks_for_heartbeats(cli, gateway):
    cli("keys", "create", "quiet")
    cli("keys", "create", "chat", "--heartbeat", "2")
    assert [sent.body.get("heartbeat_s") for sent in gateway.sent("POST", "/pilotlight/v1/keys")] == [None, 2]
    quiet, chat = (line for line in cli("keys", "ls").stdout.splitlines() if "key" in line)
    assert " off " in quiet
    assert " 2 s " in chat


def test_keys_have_priorities_and_limits_that_can_be_changed(cli, gateway):
    cli("keys", "create", "free")
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "900")
    cli("keys", "create", "batch", "--priority", "low", *limits)
    created = [sent.body.get("priority") for sent in gateway.sent("POST", "/pilotlight/v1/keys")]
    assert created == [None, "low"]
    free, batch = (line for line in cli("keys", "ls").stdout.splitlines() if "key" in line)
    assert " normal " in free
    assert " none " in free
    assert " low " in batch
    assert "60 requests/min" in batch
    changes = ("--priority", "high", "--tokens-per-minute", "0", "--concurrent-max", "2")
    changed = cli("keys", "update", "batch", *changes, "--json")
    (sent,) = gateway.sent("PATCH", "/pilotlight/v1/keys/key1")
    assert sent.body == {"priority": "high", "tokens_per_minute": None, "concurrent_max": 2}
    assert json.loads(changed.stdout)["requests_per_minute"] == 60
    assert cli("keys", "update", "batch").exit_code == 2
    assert cli("keys", "update", "nobody", "--priority", "low").exit_code == 1


def test_keys_ls_shows_no_secret_and_rm_revokes_by_name(cli, gateway):
    cli("keys", "create", "ops")
    assert "rpa_" not in cli("keys", "ls").output
    assert json.loads(cli("keys", "ls", "--json").stdout)[0]["name"] == "ops"
    assert cli("keys", "rm", "ops").exit_code == 0
    assert gateway.keys == []
    assert cli("keys", "rm", "ops").exit_code == 1


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ('{"prompt": "Hi"}', {"input": {"prompt": "Hi"}}),
        ('"text"', {"input": "text"}),
        ('{"input": {}, "policy": {"ttl": 10000}}', {"input": {}, "policy": {"ttl": 10000}}),
        ('{"input": 1, "other": 2}', {"input": {"input": 1, "other": 2}}),
    ],
)
def test_run_wraps_what_is_not_a_whole_body(cli, gateway, typed, sent):
    """serverless-api.md §2.3."""
    endpoint = gateway.add("alpha")
    result = cli("run", "alpha", typed)
    assert result.stdout == f"{JOB}\n"
    (request,) = gateway.sent("POST", f"/v2/{endpoint['id']}/run")
    assert request.body == sent


def test_run_reads_files_and_standard_input(cli, gateway, tmp_path):
    endpoint = gateway.add("alpha")
    (tmp_path / "job.json").write_text('{"a": 1}')
    cli("run", "alpha", f"@{tmp_path / 'job.json'}")
    cli("run", "alpha", "-", input='{"a": 2}')
    bodies = [one.body for one in gateway.sent("POST", f"/v2/{endpoint['id']}/run")]
    assert bodies == [{"input": {"a": 1}}, {"input": {"a": 2}}]


def test_run_sync_prints_the_output_and_passes_the_wait_on(cli, gateway):
    endpoint = gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "COMPLETED", "output": "Hello."}]
    assert cli("run", "alpha", "{}", "--sync", "--wait", "5000").stdout == "Hello.\n"
    (sent,) = gateway.sent("POST", f"/v2/{endpoint['id']}/runsync")
    assert sent.query == {"wait": "5000"}


def test_run_sync_of_a_job_that_fails_prints_it_and_ends_with_1(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "FAILED", "error": "boom"}]
    result = cli("run", "alpha", "{}", "--sync", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "boom"
    assert json.loads(result.stderr) == {"error": f"job {JOB} is FAILED: boom"}


def test_run_sync_that_outlasts_its_wait_says_how_to_go_on(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "IN_PROGRESS"}]
    result = cli("run", "alpha", "{}", "--sync")
    assert (result.exit_code, result.stdout) == (0, f"{JOB}\n")
    assert f"pilotlight status alpha {JOB} --wait" in result.stderr


def test_run_stream_prints_chunks_until_terminal_and_empty(cli, gateway):
    """serverless-api.md §2.8: terminal answers may still carry chunks."""
    gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "COMPLETED"}]
    answers = [
        {"status": "IN_QUEUE", "stream": []},
        {"status": "IN_PROGRESS", "stream": [{"output": "one"}, {"output": {"n": 2}}]},
        {"status": "COMPLETED", "stream": [{"output": "three"}]},
        {"status": "COMPLETED", "stream": []},
    ]
    gateway.chunks = list(answers)
    assert cli("run", "alpha", "{}", "--stream").stdout == 'one\n{"n": 2}\nthree\n'
    gateway.chunks = list(answers)
    shown = json.loads(cli("run", "alpha", "{}", "--stream", "--json").stdout)
    assert shown["status"] == "COMPLETED"
    assert shown["stream"] == [{"output": "one"}, {"output": {"n": 2}}, {"output": "three"}]


def test_status_wait_follows_a_job_to_its_end(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [
        {"id": JOB, "status": "IN_QUEUE"},
        {"id": JOB, "status": "IN_PROGRESS"},
        {"id": JOB, "status": "COMPLETED", "output": {"x": 1}, "delayTime": 5, "executionTime": 2000},
    ]
    result = cli("status", "alpha", JOB, "--wait", "--json")
    assert json.loads(result.stdout)["output"] == {"x": 1}
    assert result.stderr.split() == ["IN_QUEUE", "IN_PROGRESS"]
    assert "2.0 s" in cli("status", "alpha", JOB).stdout


def test_cancel_prints_the_new_state_and_unknown_jobs_are_errors(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "IN_QUEUE"}]
    assert "CANCELLED" in cli("cancel", "alpha", JOB).stdout
    result = cli("cancel", "alpha", "nope", "--json")
    assert (result.exit_code, json.loads(result.stderr)) == (1, {"error": "job not found"})


def test_logs_of_an_endpoint_and_of_a_worker(cli, gateway, a_worker):
    endpoint = gateway.add("alpha")
    gateway.workers[endpoint["id"]] = [a_worker()]
    gateway.logs[WORKER] = ["one", "two", "three"]
    assert cli("logs", "alpha").stdout == "one\ntwo\nthree\n"
    assert cli("logs", WORKER, "--tail", "1").stdout == "three\n"
    shown = json.loads(cli("logs", "alpha", "--json").stdout)
    assert [one["line"] for one in shown] == ["one", "two", "three"]
    assert shown[0]["worker_id"] == WORKER


def test_logs_without_a_living_worker_shows_the_last_one(cli, gateway):
    endpoint = gateway.add("alpha")
    gateway.starts[endpoint["id"]] = [
        {"worker_id": WORKER, "version": 1, "rung": "cold", "outcome": "failed", "stages": []}
    ]
    gateway.logs[WORKER] = ["out of memory"]
    assert cli("logs", "alpha").stdout == "out of memory\n"
    assert cli("logs", WORKER).stdout == "out of memory\n"


def test_logs_ends_after_the_stored_lines_although_the_gateway_keeps_the_stream_open(cli, gateway, a_worker):
    endpoint = gateway.add("alpha")
    gateway.workers[endpoint["id"]] = [a_worker()]
    gateway.logs[WORKER] = ["one"]
    gateway.log_stays_open = True
    assert cli("logs", "alpha").stdout == "one\n"


def test_logs_follow_of_a_worker_ends_with_its_log(cli, gateway, a_worker):
    endpoint = gateway.add("alpha")
    gateway.workers[endpoint["id"]] = [a_worker()]
    gateway.logs[WORKER] = ["one", "two"]
    result = cli("logs", WORKER, "-f", "--json")
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == ["one", "two"]


def test_logs_of_an_unknown_thing_says_so(cli, gateway):
    gateway.add("alpha")
    result = cli("logs", "what")
    assert result.exit_code == 1
    assert "neither a worker" in result.stderr


def test_usage_sums_up_and_asks_only_for_what_was_named(cli, gateway):
    endpoint = gateway.add("alpha")
    *_, sum_of_all = cli("usage").stdout.strip().splitlines()
    assert "all but frozen" in sum_of_all
    assert "1 m 30 s" in sum_of_all
    cli("usage", "alpha", "--since", "24h", "--json")
    sent = gateway.sent("GET", "/pilotlight/v1/usage")[-1]
    assert sent.query["endpoint"] == endpoint["id"]
    assert int(sent.query["since_ms"]) > 1_700_000_000_000


def test_a_run_only_key_can_run_and_chat_by_id_but_not_list(cli, gateway):
    endpoint = gateway.add("alpha")
    gateway.chat_events = [b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n', b"data: [DONE]\n\n"]
    key = {"PILOTLIGHT_API_KEY": "rpa_run0secret"}
    assert cli("run", endpoint["id"], "{}", **key).exit_code == 0
    assert cli("chat", endpoint["id"], "Hello", **key).stdout == "Hi\n"
    result = cli("ls", **key)
    assert result.exit_code == 1
    assert result.stderr == "error: access denied (the key is from PILOTLIGHT_API_KEY)\n"


def test_a_refused_key_is_named_by_its_source_and_never_shown(cli):
    result = cli("ls", PILOTLIGHT_API_KEY="rpa_wrong0secret")
    assert result.exit_code == 1
    assert "PILOTLIGHT_API_KEY" in result.stderr
    assert "wrong0secret" not in result.output


def test_doctor_reports_every_check_as_json(cli, tmp_path):
    (tmp_path / "home").mkdir(mode=0o700)
    result = cli("doctor", "--json")
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    named = {"settings", "data folder", "gateway", "engine", "launchers", "GPUs", "memory", "disk"}
    assert set(checks) == named | {"open files", "huge pages"}
    assert checks["gateway"]["status"] == "ok"
    assert checks["data folder"]["status"] == "ok"
    assert report["ok"] == (result.exit_code == 0)


def test_doctor_names_the_engine_that_is_missing_and_the_command_that_mends_it(cli, tmp_path):
    result = cli("doctor", PILOTLIGHT_ENGINE__HOME=str(tmp_path / "none"))
    assert result.exit_code == 1
    assert "pilotlight.engines.install" in result.stdout


def test_doctor_reports_a_bad_setting(cli):
    result = cli("doctor", "--json", PILOTLIGHT_SERVER__PORT="99999")
    assert result.exit_code == 1
    assert "server.port" in json.loads(result.stdout)["checks"][0]["detail"]


def test_ps_without_workers_says_why_there_are_none(cli, gateway):
    gateway.add("alpha")
    failure = {"kind": "bad_flag", "cause": "no such option", "advice": ""}
    gateway.add("beta", status="unhealthy", failure=failure)
    told = cli("ps").stderr
    assert "beta cannot start: no such option. [bad_flag]" in told
    assert "alpha" not in told


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        ([("starting", "downloading", (0, None))], "starting: downloading 0 B"),
        ([("starting", "downloading", (3_000_000_000, 4_000_000_000))], "75 %"),
        ([("starting", "downloading", (1, 2)), ("starting", "importing", None)], "starting: importing"),
        ([("starting", "starting", None)], "starting"),
        ([("ready", "ready", None), ("starting", "downloading", (1, 2))], "waiting for the answer"),
    ],
)
def test_a_wait_shows_how_far_the_furthest_worker_is(workers, text):
    views = [
        {
            "state": state,
            "stage": stage,
            "progress": progress and dict(zip(("done_bytes", "total_bytes"), progress, strict=True)),
        }
        for state, stage, progress in workers
    ]
    assert text in describe_start(views)
