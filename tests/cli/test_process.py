"""The command as a process: exit codes, streams, discovery, speed of its start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from pilotlight import __version__

ADMIN_KEY = "rpa_admin0secret"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def write_home(home, url: str, key: str = ADMIN_KEY) -> None:
    home.mkdir(exist_ok=True)
    (home / "server.json").write_text(json.dumps({"url": url, "pid": 1}))
    (home / "cli.key").write_text(key + "\n")


def test_version(spawn):
    assert finish(spawn("--version")) == (0, f"pilotlight {__version__}\n", "")


def test_help_imports_no_http_client_no_tables_and_no_web_framework():
    program = (
        "import sys; from pilotlight.cli import main\n"
        "try: sys.argv = ['pilotlight', '--help']; main()\n"
        "except SystemExit: pass\n"
        "heavy = ['httpx', 'rich', 'fastapi', 'alembic', 'pydantic', 'psutil', 'aiohttp', 'uvicorn']\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert "deploy" in result.stdout
    assert result.stderr == "[]\n"


def test_every_command_explains_itself_with_an_example():
    from typer.testing import CliRunner

    from pilotlight.cli.root import COMMANDS, app, available, load_command

    for name in set(available()) - {"up", "bench", "worker"}:
        command = load_command(name)
        assert command.help.splitlines()[0] == COMMANDS[name].summary, name
        paths = [[name, sub] for sub in getattr(command, "commands", {})] or [[name]]
        for path in paths:
            shown = CliRunner().invoke(app, [*path, "--help"])
            assert shown.exit_code == 0
            assert "Examples:\n    pilotlight " in shown.stdout, path
            assert "--json" in shown.stdout, path


def test_without_a_gateway_the_error_says_how_to_start_one(spawn):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    message = f"no gateway at {url}; start one with `pilotlight up`"
    assert finish(spawn("ls", PILOTLIGHT_URL=url)) == (1, "", f"error: {message}\n")
    code, out, err = finish(spawn("ls", "--json", PILOTLIGHT_URL=url))
    assert (code, out, json.loads(err)) == (1, "", {"error": message})


def test_something_else_at_the_url_is_an_error_and_no_traceback(spawn, tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, format, *args):  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.handle_request).start()
        code, _, err = finish(spawn("ls", PILOTLIGHT_URL=f"http://127.0.0.1:{server.server_port}"))
    assert code == 1
    assert "is this a Pilotlight gateway?" in err
    assert "Traceback" not in err


def test_the_data_folder_names_gateway_and_key(spawn, gateway, tmp_path):
    write_home(tmp_path / "home", gateway.url)
    gateway.add("alpha")
    code, out, err = finish(spawn("ls", "--json", PILOTLIGHT_URL="", PILOTLIGHT_API_KEY=""))
    assert (code, err) == (0, "")
    assert json.loads(out)[0]["name"] == "alpha"


def test_the_key_of_the_data_folder_goes_to_no_other_url(spawn, gateway, tmp_path):
    write_home(tmp_path / "home", "http://127.0.0.1:1")
    code, _, err = finish(spawn("ls", PILOTLIGHT_API_KEY=""))
    assert code == 1
    assert "PILOTLIGHT_API_KEY" in err
    assert all("authorization" not in one.headers for one in gateway.requests)


def test_a_damaged_server_file_is_named(spawn, tmp_path):
    write_home(tmp_path / "home", "not a url")
    code, _, err = finish(spawn("ls", PILOTLIGHT_URL="", PILOTLIGHT_API_KEY=""))
    assert code == 1
    assert "server.json is damaged" in err


@pytest.mark.parametrize(
    "url", ["localhost:8400", "ftp://x", "http://", "http://user:pw@h", "http://h:99999"]
)
def test_a_url_that_is_none_is_refused(spawn, url):
    code, _, err = finish(spawn("ls", PILOTLIGHT_URL=url))
    assert code == 1
    assert "PILOTLIGHT_URL" in err


def test_loopback_is_never_asked_through_a_proxy(spawn, gateway):
    proxy = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
    assert finish(spawn("ls", "--json", **proxy))[0] == 0


def test_a_pipe_that_closes_early_leaves_no_traceback(environment, gateway):
    for number in range(200):
        gateway.add(f"endpoint-{number}")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-c", "from pilotlight.cli import main; main()", "ls"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            timeout=30,
            check=False,
        )
    assert (result.returncode, result.stderr) == (141, "")


def test_the_key_is_in_no_output_of_any_reading_command(spawn, gateway):
    gateway.add("alpha")
    for command in (["ls"], ["ps"], ["keys", "ls"], ["usage"], ["doctor"]):
        _, out, err = finish(spawn(*command, "--json"))
        assert ADMIN_KEY not in out + err
