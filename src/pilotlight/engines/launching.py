"""How engines are started from what has already been imported: commands, environments, and what must agree.

Used by the gateway, which keeps launchers, and by the worker program, which asks them; both must come to the
same answers, so they are here. What runs inside the engine's own Python is in `distribution/`, which imports
nothing of this package. Pure, but for the place of this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pilotlight.domain.worker import WORKER_COOKIE

DISTRIBUTION: Final = Path(__file__).with_name("distribution")
"""Goes to the front of PYTHONPATH of engines that use it; found there by vLLM's search for plugins."""

PROTOCOL: Final = 1
"""What worker program and launcher speak; another number on the other side means that they do not agree."""

MESSAGE_BYTES_MAX: Final = 1 << 20
"""Longest message between them, its line end included."""

KEY_VARIABLE: Final = "VLLM_API_KEY"
_METHOD: Final = "VLLM_WORKER_MULTIPROC_METHOD"

PLACEHOLDERS: Final[Mapping[str, int]] = {WORKER_COOKIE: 14, KEY_VARIABLE: 43}
"""Variables by which every process of an engine is found, and the bytes that a value may have.

A forked process shows its parent's environment in /proc. So launchers begin with a placeholder for each, over
which the engine's own value is written.
"""

_FAMILIES: Final[tuple[tuple[str, str], ...]] = (
    ("VLLM_", "vLLM copies many into constants, defaults of arguments and its logging"),
    ("HF_", "huggingface_hub copies all into constants: places, endpoint, offline"),
    ("HUGGING", "older names of the same"),
    ("TRANSFORMERS_", "transformers: verbosity, offline, caches"),
    ("USE_", "transformers: which frameworks and kernels it takes"),
    ("TORCH", "torch: logging, and the configuration modules of its compiler"),
    ("PYTORCH_", "torch: allocators and kernels, in C++ at load"),
    ("AOT", "torch: ahead-of-time compiler"),
    ("INDUCTOR_", "torch: compiler"),
    ("ATEN_", "torch: processor capability, in C++ at load"),
    ("DNNL_", "oneDNN, at load"),
    ("ONEDNN_", "oneDNN, at load"),
    ("TRITON_", "triton and vLLM's view of it"),
    ("CUTE", "kernels of CUDA"),
    ("CUTLASS_", "kernels of CUDA"),
    ("FLASHINFER_", "kernels of CUDA"),
    ("AITER_", "kernels of ROCm"),
    ("CUDA_HOME", "where torch finds the compiler"),
    ("CUDNN_", "where torch finds the library"),
    ("OMP_", "libgomp and libiomp read their variables when they are loaded"),
    ("GOMP_", "libgomp, at load"),
    ("KMP_", "libiomp, at load"),
    ("MKL_", "MKL, at load"),
    ("OPENBLAS_", "OpenBLAS of numpy, at load"),
    ("NUMPY_", "numpy, at load"),
    ("NPY_", "numpy, at load"),
    ("LD_", "the dynamic linker, at the start of a program"),
    ("MALLOC_", "glibc's allocator, at the start of a program"),
    ("GLIBC_", "glibc, at the start of a program"),
    ("TCMALLOC_", "tcmalloc, at load"),
    ("PYTHON", "the interpreter, at its start"),
    ("LC_", "the interpreter's encoding, messages"),
    ("XDG_", "caches of several libraries"),
    ("LOGURU_", "loguru configures itself"),
    ("COMPRESSED_TENSORS_", "its logging"),
    ("OTEL_", "opentelemetry configures itself"),
    ("PROMETHEUS_", "how metrics are kept, and where"),
    ("prometheus_", "how metrics are kept, and where"),
    ("PROTOCOL_BUFFERS_", "which implementation of protobuf"),
    ("GRPC_", "gRPC configures itself"),
    ("PYDANTIC_", "plugins of pydantic"),
    ("WEBSOCKETS_", "limits, as constants"),
    ("TOKENIZERS_", "threads of tokenizers"),
    ("RAYON_", "threads of tokenizers"),
    ("RUST_", "logging of what is written in Rust"),
    ("SAFETENSORS_", "safetensors"),
    ("SAGEMAKER_", "vLLM's hosting standards"),
    ("OPENAI_", "the openai package"),
    ("AZURE_OPENAI_", "the openai package"),
    ("OAUTH_", "huggingface_hub"),
    ("OPENID_", "huggingface_hub"),
    ("SSL", "aiohttp makes its context for TLS"),
    ("SM_HP_", "transformers: model parallelism"),
    ("XLA_", "transformers and torch on TPUs"),
    ("NPU_", "transformers on NPUs"),
    ("COMPILE_", "torch: profiling of its compiler"),
    # Not all that begins so: many options of vLLM's do.
    ("ENABLE_PERSISTENT_", "torch: kernels of its compiler"),
    ("ENABLE_PYTORCH_", "torch: traces of its execution"),
    ("ENABLE_TEMPLATE_", "torch: kernels of its compiler"),
    ("ENABLE_TMA_", "torch: kernels of its compiler"),
    ("PARTITIONER_", "torch: its compiler"),
    ("FX_", "torch: its compiler"),
    ("PT2_", "torch: its compiler"),
    ("TVM_", "xgrammar's runtime"),
    ("XGRAMMAR_", "xgrammar"),
    ("TILELANG_", "kernels of CUDA"),
    ("NVPL_", "OpenBLAS of numpy"),
    ("GOTOBLAS_", "OpenBLAS of numpy"),
    ("SYMPY_", "sympy, constants"),
    ("MPMATH_", "sympy's arithmetic, constants"),
    ("SAGE_", "sympy's arithmetic, constants"),
    ("NETWORKX_", "networkx, constants"),
    ("PILLOW_", "pillow: allocator of images"),
    ("PYZMQ_", "pyzmq: which backend"),
    ("SETUPTOOLS_", "setuptools, which torch's compiler imports"),
    ("DISTUTILS_", "setuptools, which torch's compiler imports"),
    ("LOG_", "logging of torch's compiler and of hosting standards"),
)
"""Beginnings of names that are read when modules are imported or libraries loaded, and by what.

Found by watching the imports; a test with the engine watches again. In doubt a family is in: a difference in
vain costs one start its speed, a difference overlooked changes what an engine does.
"""

_NAMES: Final[frozenset[str]] = frozenset(
    {
        "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "CI", "CXX", "NO_COLOR", "FORCE_COLOR",
        "JAX_PLATFORMS", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "SPT_NOENV", "EAGER_IMPORT",
        "DEFER_PYDANTIC_BUILD", "DUMP_AOTI_MINIFIER", "FAKE_ALLOW_META", "KINETO_USE_DAEMON", "PSUTIL_DEBUG",
        "TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK", "UNSAFE_SKIP_FSDP_MODULE_GUARDS", "WINDOWS_CUDA_HOME",
    }
)  # fmt: skip
"""Single names of the same sort."""

_READ_AT_USE: Final[Mapping[str, str]] = {
    "VLLM_API_KEY": "the server builds its middleware after the fork",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "passed to the HTTP server",
    "VLLM_CPU_KVCACHE_SPACE": "the platform sizes the cache after it has the arguments",
    "VLLM_CPU_OMP_THREADS_BIND": "the executor binds its workers",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "the executor binds its workers",
    "VLLM_CPU_SIM_MULTI_NUMA": "the executor binds its workers",
    "VLLM_CACHE_ROOT": "joined with a file's name wherever a file is wanted",
    "VLLM_WORKER_MULTIPROC_METHOD": "set by every start by itself",
    "HF_TOKEN": "read with every request to the hub",
    "HUGGING_FACE_HUB_TOKEN": "read with every request to the hub",
    "TORCHINDUCTOR_CACHE_DIR": "read whenever something is compiled, but for an experiment that is off",
    "HF_CONFIG_PATH": "an option of vLLM's",
    "HF_OVERRIDES": "an option of vLLM's",
    "LOG_ERROR_STACK": "an option of vLLM's",
    "OPENAI_RESPONSE_ROLE": "an option of vLLM's",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "an option of vLLM's",
    "OPENAI_STRICT_PASSTHROUGH": "the worker program's own",
}
"""Variables of these families that are read when they are needed, hence may differ, and by what."""


def import_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide what importing vLLM results in, in the order of their names."""
    return {
        name: value
        for name, value in sorted(env.items())
        if name in _NAMES
        or (name.startswith(_PREFIXES) and name not in _READ_AT_USE)
        or name.endswith("_NO_EXTENSIONS")
    }


_PREFIXES: Final = tuple(prefix for prefix, _ in _FAMILIES)


def differences(launcher: Mapping[str, str], engine: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the variables that forbid starting an engine from a launcher, sorted; none = it may.

    Args:
        launcher: The environment the launcher was started with, as it says.
        engine: The environment that the engine is to have.
    """
    theirs = import_environment(_as_given(launcher))
    ours = import_environment(_as_given(engine))
    return tuple(sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)))


def fingerprint(home: Path, version: str, env: Mapping[str, str]) -> str:
    """What one launcher can serve: the same for all engines of one environment and import-time variables.

    Args:
        home: The engine's virtual environment, links resolved: they may come to mean another one.
        version: Of the engine there, which may be exchanged in place.
        env: The environment of an engine, or of a launcher for it.
    """
    facts = [str(home), version, import_environment(_as_given(env))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def launcher_command(home: Path, socket: Path, preload: Sequence[str] = ()) -> tuple[str, ...]:
    """The command of a launcher.

    Args:
        home: The engine's virtual environment.
        socket: Where it listens; at most 107 bytes.
        preload: Classes of models, such as `LlamaForCausalLM`, to import before the first engine asks.
    """
    command = (str(home / "bin" / "python"), "-m", "pilotlight_engine.launcher", "--socket", str(socket))
    return (*command, "--preload", ",".join(preload)) if preload else command


def launcher_environment(env: Mapping[str, str]) -> dict[str, str]:
    """A launcher's environment, made of that of an engine; of the engine's secrets it gets placeholders."""
    placeholders = {name: "-" * length for name, length in PLACEHOLDERS.items()}
    return serve_environment(env) | placeholders | {_METHOD: "fork"}


def serve_command(home: Path) -> tuple[str, ...]:
    """The command that starts one engine which imports once; takes vLLM's own arguments after it."""
    return (str(home / "bin" / "python"), "-m", "pilotlight_engine.serve")


def serve_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for `serve_command`, made of the engine's."""
    path = _as_given(env).get("PYTHONPATH")
    return {
        **env,
        "PYTHONPATH": f"{DISTRIBUTION}:{path}" if path else str(DISTRIBUTION),
        "PILOTLIGHT_ENGINE_FORK": "1",
        # Who chose something else gets no fork, neither from `serve` nor from a launcher.
        _METHOD: env.get(_METHOD, "fork"),
        # Otherwise process titles are written over the memory that /proc/PID/environ shows.
        "SPT_NOENV": "1",
    }


def _as_given(env: Mapping[str, str]) -> dict[str, str]:
    """The environment as it was before `serve_environment` and before Python, as far as imports go."""
    rest = dict(env)
    if not rest.get("LC_ALL") and rest.get("LANG", "") in {"", "C", "POSIX"}:
        # So Python says to itself and to its children where nobody chose a locale (PEP 538).
        rest.setdefault("LC_CTYPE", "C.UTF-8")
    path = rest.pop("PYTHONPATH", "")
    others = [part for part in path.split(":") if part and part != str(DISTRIBUTION)]
    if others:
        rest["PYTHONPATH"] = ":".join(others)
    return rest
