"""vLLM's CPU worker in a forked process."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from pilotlight_engine.imports import imported_here
from pilotlight_engine.threads import set_up_threads


class ForkedCpuWorker(CPUWorker):
    """vLLM's worker, with its threads and its processor's matrix unit set up before it computes anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # vLLM may still have decided to spawn its processes; those get their threads from the environment.
        if imported_here():
            set_up_threads(os.environ, torch.set_num_threads)
        # A process has to ask for AMX before it uses it. Kernels of torch's do, which only longer prompts
        # need; vLLM's attention does not, and would die at a short first prompt of an illegal instruction.
        torch.cpu._init_amx()  # noqa: SLF001 - there is no public name
        super().__init__(*args, **kwargs)
