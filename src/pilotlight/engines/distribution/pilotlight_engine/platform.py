"""vLLM's CPU platform, whose processes are forked from one that has imported everything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

from pilotlight_engine.imports import imported_here

if TYPE_CHECKING:
    # vLLM imports this module in the middle of importing that one.
    from vllm.config import VllmConfig

_VLLM_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
_FORKED_WORKER = "pilotlight_engine.worker.ForkedCpuWorker"


class ForkingCpuPlatform(CpuPlatform):
    """vLLM's, but that it does not insist on new interpreters where a fork does the same."""

    _kernels_replaced = False

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Replaces the kernels, unless this process or one that it was forked from has done so."""
        if not ForkingCpuPlatform._kernels_replaced:
            super().register_triton_kernel_overrides()
            ForkingCpuPlatform._kernels_replaced = True

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Lets vLLM decide everything, then goes back to forking, unless somebody brought his own worker."""
        super().check_and_update_config(vllm_config)
        parallel = vllm_config.parallel_config
        if imported_here() and parallel.worker_cls in {_VLLM_WORKER, _FORKED_WORKER}:
            parallel.worker_cls = _FORKED_WORKER
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            _let_others_run()


def _let_others_run() -> None:
    """Has this process, and those forked from it, poll each other without `sched_yield`.

    While they compute they call it hundreds of thousands of times a second. Where Linux schedules each
    session as a group of its own (sched(7), autogroup), others, such as the gateway, then wait for seconds.
    """
    from vllm.distributed import utils

    utils.USE_SCHED_YIELD = False
