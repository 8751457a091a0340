"""Keys with two scopes, and who may ask the management API (serverless-api.md §7.1, §10)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import structlog

from pilotlight.domain.key import Priority

URL = "/pilotlight/v1/keys"


async def test_a_key_shows_its_secret_once(management):
    endpoint = await management.create()
    answer = await management.http.post(URL, json={"name": "ci", "endpoints": [endpoint["id"]]})
    assert answer.status_code == 201
    made = answer.json()
    secret = made.pop("key")
    assert secret.startswith("rpa_")
    assert made | {"id": ""} == {
        "id": "",
        "name": "ci",
        "status": "active",
        "scope": "run",
        "endpoints": [endpoint["id"]],
        "heartbeat_s": None,
        "priority": "normal",
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "concurrent_max": None,
        "created_at": "2026-05-28T20:26:40Z",
    }
    listed = await management.http.get(URL)
    assert listed.json()["keys"][1] == made
    assert secret not in listed.text
    assert management.directory.key(secret).may_call(endpoint["id"])
    assert (await management.http.delete(f"{URL}/{made['id']}")).status_code == 204
    assert management.directory.key(secret) is None
    assert (await management.http.delete(f"{URL}/{made['id']}")).status_code == 404


async def test_a_key_may_ask_for_heartbeats(management):
    for seconds in (1, 2.5, 60):
        made = (await management.http.post(URL, json={"scope": "admin", "heartbeat_s": seconds})).json()
        assert made["heartbeat_s"] == seconds
        assert management.directory.key(made["key"]).heartbeat_s == seconds
        assert (await management.http.get(URL)).json()["keys"][-1]["heartbeat_s"] == seconds


async def test_a_key_has_a_priority_and_limits_that_may_change(management):
    terms = {"priority": "high", "requests_per_minute": 60, "tokens_per_minute": 10**9, "concurrent_max": 3}
    made = (await management.http.post(URL, json={"scope": "admin", "name": "k", **terms})).json()
    assert made | terms == made
    key = management.directory.key(made["key"])
    assert (key.priority, key.share, key.limited) == (Priority.HIGH, 16, True)
    lifted = {"requests_per_minute": None, "tokens_per_minute": None, "concurrent_max": None}
    for changes in ({"priority": "low"}, lifted, {"name": "new", "heartbeat_s": 2}):
        answer = await management.http.patch(f"{URL}/{made['id']}", json=changes)
        assert answer.status_code == 200
        assert answer.json() | changes == answer.json()
    key = management.directory.key(made["key"])
    assert (key.priority, key.name, key.limited, key.heartbeat_s) == (Priority.LOW, "new", False, 2)
    assert (await management.http.patch(f"{URL}/nobody", json=lifted)).status_code == 404
    for wrong in ({"scope": "run"}, {"name": None}, {"name": ""}, {"priority": None}, {"concurrent_max": 0}):
        assert (await management.http.patch(f"{URL}/{made['id']}", json=wrong)).status_code == 422


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "a key of scope run needs at least one endpoint id"),
        ({"endpoints": ["nosuchid"]}, "endpoints names nosuchid, which does not exist"),
        ({"scope": "admin", "endpoints": ["x"]}, "leave endpoints out"),
        ({"scope": "root"}, "'admin' or 'run'"),
        ({"scope": "admin", "bogus": 1}, "additional properties 'bogus' not allowed"),
        ({"scope": "admin", "heartbeat_s": 0.5}, "greater than or equal to 1"),
        ({"scope": "admin", "heartbeat_s": 61}, "less than or equal to 60"),
        ({"scope": "admin", "heartbeat_s": True}, "number"),
        ({"scope": "admin", "priority": "urgent"}, "'low', 'normal' or 'high'"),
        ({"scope": "admin", "requests_per_minute": 0}, "greater than or equal to 1"),
        ({"scope": "admin", "tokens_per_minute": 1.5}, "integer"),
        ({"scope": "admin", "concurrent_max": 1_000_001}, "less than or equal to 1000000"),
    ],
)
async def test_bad_keys_are_refused(management, body, words):
    answer = await management.http.post(URL, json=body)
    assert answer.status_code == 422
    assert words in answer.text.replace("\\", "")


async def test_the_last_admin_key_stays(management):
    (first,) = (await management.http.get(URL)).json()["keys"]
    answer = await management.http.delete(f"{URL}/{first['id']}")
    assert answer.status_code == 409
    await management.http.post(URL, json={"scope": "admin"})
    assert (await management.http.delete(f"{URL}/{first['id']}")).status_code == 204


@pytest.mark.parametrize("path", [URL, "/v2/serverless", "/pilotlight/v1/nowhere"])
async def test_only_admin_keys_may_ask(management, path):
    endpoint = await management.create()
    run_only = await management.run_key(endpoint["id"])
    for header, status, detail in (
        (None, 401, "missing bearer token"),
        ("", 401, "missing bearer token"),
        ("Basic abc", 401, "missing bearer token"),
        (management.admin, 401, "missing bearer token"),
        ("Bearer rpa_WRONG", 401, "unknown API key"),
        (f"Bearer {run_only}", 403, "access denied"),
    ):
        headers = {} if header is None else {"Authorization": header}
        management.http.headers.pop("Authorization", None)
        answer = await management.http.get(path, headers=headers)
        assert answer.status_code == status
        assert answer.json()["status"] == status
        assert answer.json()["detail"].startswith(detail)
        assert answer.headers["content-type"] == "application/problem+json"
    answer = await management.http.get(path, headers={"Authorization": f"bEARER  {management.admin} "})
    assert answer.status_code == (404 if path.endswith("nowhere") else 200)


async def test_a_stranger_learns_nothing_from_a_bad_body(management):
    answer = await management.http.post(URL, content=b"{", headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401


async def test_description_and_docs_need_no_key(management):
    management.http.headers.pop("Authorization")
    description = await management.http.get("/pilotlight/v1/openapi.json")
    assert description.status_code == 200
    assert "/v2/serverless/{endpoint_id}/workers/{worker_id}/logs" in description.json()["paths"]
    assert description.json()["paths"]["/pilotlight/v1/keys"]["get"]["security"] == [{"HTTPBearer": []}]
    assert (await management.http.get("/pilotlight/v1/docs")).status_code == 200


async def test_wrong_methods_and_paths_are_problems(management):
    answer = await management.http.put("/pilotlight/v1/keys", json={})
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]
    assert answer.json()["title"] == "Method Not Allowed"
    answer = await management.http.get("/v2/templates")
    assert (answer.status_code, answer.json()["detail"]) == (404, "resource not found")


async def test_a_body_beyond_the_limit_is_not_read(management):
    answer = await management.http.post("/pilotlight/v1/endpoints", content=b" " * (1024 * 1024 + 1))
    assert answer.status_code == 413

    async def endless():
        for _ in range(40):
            yield b" " * 65_536

    answer = await management.http.post("/pilotlight/v1/endpoints", content=endless())
    assert answer.status_code == 413


async def test_an_internal_error_says_nothing_about_us(management, monkeypatch):
    def broken():
        raise RuntimeError("secret detail")

    monkeypatch.setattr(management.service, "endpoints", broken)
    with structlog.testing.capture_logs() as logged:
        answer = await management.http.get("/pilotlight/v1/endpoints")
    assert [entry["event"] for entry in logged] == ["management.request_failed"]
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret detail" not in answer.text


def test_the_api_imports_nothing_large():
    """The gateway promises to stay small: hub client, migrations and models' libraries are loaded when needed."""
    code = (
        "import sys, json, pilotlight.management, pilotlight.models.catalog, pilotlight.models.fit;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(json.loads(output.stdout))
    assert not loaded & {"huggingface_hub", "transformers", "torch", "vllm", "alembic", "sqlalchemy", "tqdm"}


async def test_a_method_that_no_route_of_a_path_has_is_told_all_that_they_have(management):
    answer = await management.http.put("/pilotlight/v1/keys")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
