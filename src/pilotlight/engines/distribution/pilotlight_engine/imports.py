"""Everything of vLLM that is imported before the model is known, and what must not happen meanwhile.

A process that is to be forked may have imported anything, but may not have computed: the threads that libgomp
keeps for that do not survive a fork, and the child would wait for them. Nor may it have touched a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pilotlight_engine.warming import warm_up

ESSENTIAL = (
    "torch",
    "transformers",
    "vllm",
    "vllm.engine.arg_utils",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor",
)
"""A vLLM that lacks one of these is not one that this was written for."""

OF_PLATFORM = {
    "cpu": ("vllm.v1.worker.cpu_worker", "pilotlight_engine.worker"),
    "cuda": ("vllm.v1.worker.gpu_worker",),
}
"""What is as essential, by vLLM's name of the platform."""

SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
"""Where the HTTP server is, newest first; the first that is there counts."""

GENERAL = (
    "setproctitle",
    "uvloop",
    "multiprocessing.popen_fork",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.auto",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
    "transformers.models.auto.tokenization_auto",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.launchers.render.entry",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.models.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.pooling.embed.api_router",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.middleware.authenticate",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "model_hosting_container_standards.sagemaker",
    "model_hosting_container_standards.common.custom_code_ref_resolver",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.renderers.hf",
    "vllm.triton_utils.dispatcher",
    "vllm.utils.cpu_triton_utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.pool.flash_maxsim",
)
"""What the three processes of a text model import by themselves, watched with vLLM 0.32.

Other versions need not have all of it.
"""

ELEMENTS_MAX = 1024
"""Tensors of modules' constants are smaller; nothing so small is worth a thread to torch."""

_state: dict[str, bool] = {}


def imported_here() -> bool:
    """Whether this process, or one that it was forked from, has imported everything."""
    return _state.get("imported", False)


def import_engine(between: Callable[[], None], architectures: Iterable[str] = ()) -> str:
    """Imports everything.

    Args:
        between: Called after each module.
        architectures: Classes of models to import as well.

    Returns:
        What speaks against forking from here; "" if nothing does.

    Raises:
        ImportError: An essential module is not there.
    """
    importlib.import_module("torch")
    between()
    with tensor_operations() as computed:
        for module in ESSENTIAL:
            importlib.import_module(module)
            between()
        from vllm.platforms import current_platform

        kind = next((name for name in OF_PLATFORM if getattr(current_platform, f"is_{name}")()), "")
        if not kind:
            return f"engines are forked on CPUs and on CUDA, not on {current_platform.device_type}"
        for module in OF_PLATFORM[kind]:
            importlib.import_module(module)
            between()
        for module in (_server(), *GENERAL):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
            between()
        warm_up()
    _state["imported"] = True
    return (computed[0] if computed else "") or import_models(architectures)


def _server() -> str:
    for name in SERVERS[:-1]:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name):
                return name
    return SERVERS[-1]


def import_models(architectures: Iterable[str]) -> str:
    """Imports these classes of models, as far as vLLM has them, and tells its registry what they can.

    Otherwise each engine would import its own, and vLLM would start one more process to look at a class
    that its cache does not describe.

    Returns:
        What speaks against forking from here; "" if nothing does.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    with tensor_operations() as computed:
        for name in architectures:
            known = ModelRegistry.models.get(name)
            if known is not None and hasattr(known, "module_name"):
                # A class that cannot be imported is vLLM's to complain of, in the engine that wants it.
                with contextlib.suppress(Exception):
                    ModelRegistry.register_model(name, known.load_model_cls())
    return computed[0] if computed else ""


def forbidding() -> str:
    """What has happened in this process that forbids forking from it; "" if nothing has."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            # Other devices of NVIDIA may be open for NVML, which only counts GPUs.
            if (device := str(Path("/proc/self/fd", name).readlink())).startswith("/dev/nvidia-uvm"):
                return f"CUDA was touched: {device} is open"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialized"
    return ""


def single_threaded() -> str:
    """What threads there are beside the first, "" if there are none.

    Threads of OpenBLAS, which numpy brings, end with a first fork and come back when they are needed; every
    other one would be missing in a forked process.
    """
    tasks = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    names: list[str] = []
    for task in tasks:
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text(encoding="utf-8").strip())
    return f"{len(names)} threads run beside the first: {', '.join(sorted(names))}" if names else ""


@contextlib.contextmanager
def tensor_operations() -> Iterator[list[str]]:
    """Gathers what is computed meanwhile with tensors larger than constants of modules, or on a device."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for each in tree_leaves((args, kwargs, result)):
                if isinstance(each, torch.Tensor) and (
                    each.numel() > ELEMENTS_MAX or each.device.type not in {"cpu", "meta"}
                ):
                    size = " by ".join(str(side) for side in each.shape)
                    seen.append(f"while importing, {func} computed with {size} elements on {each.device}")
                    break
            return result

    with Watch():
        yield seen
