"""Libraries that vLLM wants loaded before all others on CPUs.

Its platform puts them into LD_PRELOAD for workers that it spawns. A forked worker has what its launcher had,
so the launcher starts itself again with them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

MARK = "PILOTLIGHT_ENGINE_PRELOADED"
"""What LD_PRELOAD was before, in the environment of a process that has started itself again."""

_THREADS = ("libgomp", "libomp", "libiomp")


def preloads(env: Mapping[str, str], folders: Mapping[str, Path | None]) -> str:
    """LD_PRELOAD as vLLM's CPU platform would have it in its workers.

    Args:
        env: The environment so far.
        folders: Where the packages `torch` and `vllm` are; None = not there.
    """
    value = env.get("LD_PRELOAD", "")
    torch, vllm = folders["torch"], folders["vllm"]
    if torch is None or vllm is None or any((torch / "lib").glob("libtorch_cuda*.so")):
        return value
    if not any(name in value for name in _THREADS):
        found = [*torch.parent.glob("torch.libs/libgomp*.so*"), *torch.glob("lib/libgomp*.so*")]
        value = ":".join(filter(None, (value, *map(str, found[:1]))))
    if "libtcmalloc" not in value:
        found = [*vllm.glob("libs/libtcmalloc_minimal*.so*"), *vllm.glob("libs/libtcmalloc.so*")]
        value = ":".join(filter(None, (*map(str, found[:1]), value)))
    return value


def start_again(module: str, arguments: list[str]) -> None:
    """Replaces this process by the same with vLLM's libraries loaded first; returns where they are."""
    if MARK in os.environ:
        before = os.environ.pop(MARK)
        os.environ.pop("LD_PRELOAD", None)
        if before:
            os.environ["LD_PRELOAD"] = before
        return
    value = preloads(os.environ, {name: _folder(name) for name in ("torch", "vllm")})
    if value != os.environ.get("LD_PRELOAD", ""):
        env = os.environ | {MARK: os.environ.get("LD_PRELOAD", ""), "LD_PRELOAD": value}
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], env)


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None
