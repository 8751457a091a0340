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
