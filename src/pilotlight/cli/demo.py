"""`pilotlight up --demo`, the heart of `make run`: deploy the built-in model and ask it a question.

A client of the gateway's own HTTP API like any other.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import httpx
import msgspec

from pilotlight.client.discovery import KEY_FILE
from pilotlight.logs import say

MODEL = "pilotlight/ember"
NAME = "ember"
QUESTION = "What is the capital of France?"
KEY_NAME = "make run"


async def run_demo(url: str, home: Path) -> int:
    """Deploy, ask, print answer, URL and key; 0 when the model answered.

    Args:
        url: The gateway.
        home: The data folder, where the CLI's key is.
    """
    admin = (home / KEY_FILE).read_text().strip()
    headers = {"authorization": f"Bearer {admin}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60) as api:
        try:
            endpoint = await _deploy(api)
            key = await _issue_key(api, endpoint["id"])
        except httpx.HTTPStatusError as error:
            problem = msgspec.json.decode(error.response.content)
            say(f"error: {problem.get('detail', error)}")
            return 1
        except httpx.HTTPError as error:
            say(f"error: {error}")
            return 1
    say(f"Endpoint {endpoint['name']} ({endpoint['id']}) has no worker. Asking: {QUESTION}")
    answer = await _ask(endpoint["openai_url"], key, url, admin, endpoint["id"])
    if answer is None:
        return 1
    sys.stdout.write(_SUMMARY.format(question=QUESTION, answer=answer, url=endpoint["openai_url"], key=key))
    sys.stdout.flush()
    return 0


_SUMMARY = """
  Q: {question}
  A: {answer}

  base URL  {url}
  API key   {key}

  curl {url}/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
    -d '{{"model": "pilotlight/ember", "messages": [{{"role": "user", "content": "What is 2 plus 3?"}}]}}'

  Ctrl-C stops everything.
"""


async def _deploy(api: httpx.AsyncClient) -> dict[str, str]:
    listed = await api.get("/pilotlight/v1/endpoints")
    listed.raise_for_status()
    for endpoint in listed.json()["endpoints"]:
        if endpoint["name"] == NAME:
            found: dict[str, str] = endpoint
            if found["model"] != MODEL:
                revised = await api.patch(f"/pilotlight/v1/endpoints/{found['id']}", json={"model": MODEL})
                revised.raise_for_status()
            return found
    made = await api.post("/pilotlight/v1/endpoints", json={"model": MODEL, "name": NAME})
    made.raise_for_status()
    created: dict[str, str] = made.json()
    return created


async def _issue_key(api: httpx.AsyncClient, endpoint_id: str) -> str:
    keys = await api.get("/pilotlight/v1/keys")
    keys.raise_for_status()
    for key in keys.json()["keys"]:
        if key["name"] == KEY_NAME:
            (await api.delete(f"/pilotlight/v1/keys/{key['id']}")).raise_for_status()
    body = {"name": KEY_NAME, "scope": "run", "endpoints": [endpoint_id]}
    made = await api.post("/pilotlight/v1/keys", json=body)
    made.raise_for_status()
    secret: str = made.json()["key"]
    return secret


async def _ask(openai_url: str, key: str, url: str, admin: str, endpoint_id: str) -> str | None:
    started = time.monotonic()
    watching = asyncio.create_task(_show_stages(url, admin, endpoint_id, started), name="demo-stages")
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
    }
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(10, read=600)) as client:
            answer = await client.post(
                f"{openai_url}/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
            )
    except httpx.HTTPError as error:
        say(f"error: {error!r}")
        return None
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    if answer.status_code != 200:
        say(f"error: HTTP {answer.status_code}: {answer.text[:2000]}")
        return None
    say(f"Answered {time.monotonic() - started:.1f} s after the question, from zero workers.")
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


async def _show_stages(url: str, admin: str, endpoint_id: str, started: float) -> None:
    """Print each new stage of the starting worker, so that the wait explains itself."""
    shown = ""
    headers = {"authorization": f"Bearer {admin}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=10) as api:
        while True:
            answer = await api.get(f"/v2/serverless/{endpoint_id}/workers")
            stages = [worker.get("stage", "") for worker in answer.json().get("workers", [])]
            if stages and stages[-1] != shown:
                shown = stages[-1]
                say(f"  {time.monotonic() - started:5.1f} s  worker: {shown.replace('_', ' ')}")
            await asyncio.sleep(0.25)
