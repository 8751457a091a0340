"""Says to vLLM which platform class to take; called in every process of an engine."""

from __future__ import annotations

import os

FORK_VARIABLE = "PILOTLIGHT_ENGINE_FORK"


def register() -> str | None:
    """The class by which engines on CPUs fork their processes; None leaves the choice to vLLM."""
    if os.environ.get(FORK_VARIABLE) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin

    # A subclass of vLLM's own for special processors would be passed over by ours.
    if cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return "pilotlight_engine.platform.ForkingCpuPlatform"
