"""Which folders a container may see."""

from __future__ import annotations

import pytest

from pilotlight.clusters.volumes import resolve_volume
from pilotlight.domain.endpoint import Volume
from pilotlight.errors import ClusterError, SettingsError
from pilotlight.settings import load_settings


def volume(source):
    return Volume(source=str(source), target="/data")


def test_below_a_root_and_named_ones(tmp_path):
    inside = tmp_path / "root" / "models"
    inside.mkdir(parents=True)
    assert resolve_volume(volume(inside), [tmp_path / "other", tmp_path / "root"]) == volume(inside)
    assert resolve_volume(volume("models"), []) == volume("models")


def test_elsewhere_is_refused_also_behind_a_link_and_behind_dots(tmp_path):
    """A container that writes to its folder can put a link into it; the next one must not get what it names."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for folder in (root, secret):
        folder.mkdir()
    (root / "link").symlink_to(secret)
    for source in (secret, root / "link", f"{root}/../secret", "/"):
        with pytest.raises(ClusterError, match=r"may not be given to containers.*containers\.volume_roots"):
            resolve_volume(volume(source), [root])


def test_a_link_within_is_followed_before_the_engine_could(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve_volume(volume(tmp_path / "link"), [tmp_path]).source == str(tmp_path / "real")


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(ClusterError, match="does not exist"):
        resolve_volume(volume(tmp_path / "none"), [tmp_path])


def test_the_roots_are_a_folder_of_ours_and_what_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PILOTLIGHT_CONTAINERS__VOLUME_ROOTS", '["/srv/models"]')
    settings = load_settings(home=tmp_path)
    assert [str(root) for root in settings.volume_roots] == [f"{tmp_path}/volumes", "/srv/models"]
    monkeypatch.setenv("PILOTLIGHT_CONTAINERS__VOLUME_ROOTS", '["models"]')
    with pytest.raises(SettingsError, match="no absolute folder"):
        load_settings(home=tmp_path)
