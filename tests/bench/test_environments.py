"""Proxies that cannot be installed are left out; one that is not known is refused."""

import sys

import pytest

from pilotlight.bench.gateway_proxies import VLLM_ROUTER, start_proxies
from pilotlight.cli.root import UsageError


def test_what_cannot_be_installed_is_left_out_and_nothing_of_it_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PILOTLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert start_proxies(None, 1, (VLLM_ROUTER,)) == []
    told = capsys.readouterr().err
    assert "making the environment bench-vllm-router-" in told
    assert "`/bin/false -m venv" in told
    assert "left out: vllm-router" in told
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_to_is_a_reason_too(monkeypatch, capsys):
    monkeypatch.setenv("PILOTLIGHT_CACHE", "/dev/null/cache")
    assert start_proxies(None, 1, (VLLM_ROUTER,)) == []
    assert "cannot be made: Not a directory; left out: vllm-router" in capsys.readouterr().err


def test_an_unknown_proxy_is_refused_by_name():
    with pytest.raises(UsageError, match="'envoy'; there are nginx, vllm-router, litellm"):
        start_proxies(None, 1, ("nginx", "envoy"))
