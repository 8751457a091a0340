"""Settings: the environment, the file, and what they refuse."""

from __future__ import annotations

import pytest

from pilotlight.errors import SettingsError
from pilotlight.settings import load_settings


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("PILOTLIGHT_HOME", str(tmp_path))
    return tmp_path


def test_the_environment_wins_over_the_file(home, monkeypatch):
    (home / "pilotlight.toml").write_text("[server]\nport = 1\n[limits]\nhold_s = 7\n")
    monkeypatch.setenv("PILOTLIGHT_SERVER__PORT", "2")
    settings = load_settings()
    assert (settings.server.port, settings.limits.hold_s, settings.home) == (2, 7, home)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("PILOTLIGHT_SERVER__PORT", "70000", "server.port"),
        ("PILOTLIGHT_SERVER__PROT", "1", "server.prot"),
        ("PILOTLIGHT_SEVER__PORT", "1", "sever"),
        ("PILOTLIGHT_LIMITS__HOLD_S", "-1", "limits.hold_s"),
        ("PILOTLIGHT_JOBS__TAKE_HOLD_S", "61", "jobs.take_hold_s"),
        ("PILOTLIGHT_JOBS__STOP_HOLD_S", "61", "jobs.stop_hold_s"),
        ("PILOTLIGHT_JOBS__CONFIRM_S", "0", "jobs.confirm_s"),
        ("PILOTLIGHT_CONFIG", "/does/not/exist.toml", "no such file"),
        ("PILOTLIGHT_HOME", "", "PILOTLIGHT_HOME is empty"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch, name, value, named):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=named):
        load_settings()


@pytest.mark.parametrize("text", ["[server\n", "[sever]\nport = 1\n", "[server]\nprot = 1\n"])
def test_a_bad_file_is_refused(home, text):
    (home / "pilotlight.toml").write_text(text)
    with pytest.raises(SettingsError):
        load_settings()


def test_a_home_below_the_users_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PILOTLIGHT_HOME", "~/data")
    assert load_settings().home == tmp_path / "data"


@pytest.mark.parametrize(("interval_ms", "confirm_s"), [(1000, 4), (2000, 6), (2100, 7), (10_000, 22)])
def test_a_hand_out_has_two_heartbeats_and_two_seconds_to_be_confirmed(monkeypatch, interval_ms, confirm_s):
    """worker-protocol.md §8: with heartbeats every 10 s, 6 s took jobs from workers that ran them."""
    assert load_settings().jobs.confirm_s == 6
    monkeypatch.setenv("PILOTLIGHT_JOBS__PING_INTERVAL_MS", str(interval_ms))
    assert load_settings().jobs.confirm_s == confirm_s
    monkeypatch.setenv("PILOTLIGHT_JOBS__CONFIRM_S", "3")
    assert load_settings().jobs.confirm_s == 3


def test_holds_keep_below_the_libraries_patience(monkeypatch):
    """worker-protocol.md §8: never more than 60 s; the library hangs up after 90 s."""
    for name in ("TAKE_HOLD_S", "STOP_HOLD_S"):
        monkeypatch.setenv(f"PILOTLIGHT_JOBS__{name}", "60")
    jobs = load_settings().jobs
    assert (jobs.take_hold_s, jobs.stop_hold_s) == (60, 60)
