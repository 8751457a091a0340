"""Every variable that the contract of the vLLM worker knows, as data (`vllm-worker.md` §4.4, §4.5, §4.9).

Pure. One row for each name: what kind it is, its documented default, which option it ends in, what to know.
Whatever is an option of the installed vLLM and has no row here is set by its own name in capitals as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pilotlight.engines.flags.masking import is_secret_name


class Kind(StrEnum):
    """What becomes of a variable."""

    OPTION = "option"
    """It sets the option of its own name."""
    ALIAS = "alias"
    """It sets an option of another name."""
    PART = "part"
    """It decides an option together with others, by a rule of its own."""
    WORKER = "worker"
    """The worker program reads it."""
    STORAGE = "storage"
    """It says where models lie; worker and engine follow it."""
    ENGINE = "engine"
    """The engine finds it in its environment."""
    PLATFORM = "platform"
    """The platform tells the worker by it; the engine never sees it."""
    KEPT_BACK = "kept back"
    """It would disturb the engine and is kept from it."""
    UNMAPPED = "unmapped"
    """Orchestrators set it for other purposes, or the worker decides: no option by this name."""
    OBSOLETE = "obsolete"
    """No current vLLM understands it."""
    IGNORED = "ignored"
    """It never had, or has no longer, any effect."""


NUMBER_MAX: Final = 999_999_999
"""Largest number that the worker program reads where nothing says less."""


class Legal(StrEnum):
    """What a variable of the worker program's own may hold."""

    TEXT = "text"
    NUMBER = "number"
    BOOLEAN = "boolean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One name.

    Attributes:
        name: In capitals.
        kind: What becomes of it.
        default: What is documented, or what templates send by themselves; "" for nothing.
        option: The option it ends in, for an alias and a part.
        note: What to know; for an obsolete one, what to use in its place.
        weak: An alias that yields to the option's own name; others win over it (§4.5).
        gone: Obsolete even where the parser still takes the option.
        quiet: Values in lower case that templates send and that ask for nothing: no note about them.
        secret: What it holds is never shown.
        legal: What it may hold, for one that the worker program reads.
        choices: The words it may hold.
        minimum: Least number it may hold.
        maximum: Largest number it may hold.
        whole: The number must be whole.
        words: Words it may hold in place of a number.
    """

    name: str
    kind: Kind
    default: str = ""
    option: str = ""
    note: str = ""
    weak: bool = False
    gone: bool = False
    quiet: frozenset[str] = frozenset()
    secret: bool = False
    legal: Legal = Legal.TEXT
    choices: tuple[str, ...] = ()
    minimum: float = 0
    maximum: float = NUMBER_MAX
    whole: bool = False
    words: tuple[str, ...] = ()


def _options(**defaults: str) -> tuple[Variable, ...]:
    return tuple(Variable(name=name, kind=Kind.OPTION, default=text) for name, text in defaults.items())


def _alias(name: str, option: str, default: str = "", *, weak: bool = False) -> Variable:
    return Variable(name=name, kind=Kind.ALIAS, option=option, default=default, weak=weak)


def _parts(option: str, **notes: str) -> tuple[Variable, ...]:
    return tuple(
        Variable(name=name, kind=Kind.PART, option=option, note=note) for name, note in notes.items()
    )


def _worker(name: str, default: str = "", note: str = "read by the worker program") -> Variable:
    return Variable(name=name, kind=Kind.WORKER, default=default, note=note)


def _number(
    name: str, default: str, minimum: float, *words: str, maximum: float = NUMBER_MAX, whole: bool = False
) -> Variable:
    note = "read by the worker program"
    return Variable(
        name=name,
        kind=Kind.WORKER,
        default=default,
        note=note,
        legal=Legal.NUMBER,
        minimum=minimum,
        maximum=maximum,
        whole=whole,
        words=words,
    )


def _switch(name: str, default: str) -> Variable:
    note = "read by the worker program"
    return Variable(name=name, kind=Kind.WORKER, default=default, note=note, legal=Legal.BOOLEAN)


def _choice(name: str, *choices: str) -> Variable:
    note = "read by the worker program"
    return Variable(name=name, kind=Kind.WORKER, default=choices[0], note=note, choices=choices)


def _obsolete(name: str, note: str, default: str = "") -> Variable:
    return Variable(name=name, kind=Kind.OBSOLETE, note=note, default=default)


def _all(kind: Kind, names: str, note: str) -> tuple[Variable, ...]:
    return tuple(
        Variable(name=name, kind=kind, note=note, secret=is_secret_name(name)) for name in names.split()
    )


_MODEL_AND_TOKENIZER: Final = (
    _worker("MODEL_NAME", note="the model"),
    _alias("MODEL_REVISION", "REVISION", "main"),
    _alias("TOKENIZER_NAME", "TOKENIZER"),
    _alias("MAX_MODEL_LENGTH", "MAX_MODEL_LEN", weak=True),
    _alias("CUSTOM_CHAT_TEMPLATE", "CHAT_TEMPLATE"),
    *_parts(
        "HF_OVERRIDES",
        ROPE_SCALING="goes into HF_OVERRIDES as rope_scaling",
        ROPE_THETA="goes into HF_OVERRIDES as rope_theta",
    ),
    *_parts("RUNNER", TASK="decides RUNNER and CONVERT"),
    *_parts("STRUCTURED_OUTPUTS_CONFIG", GUIDED_DECODING_BACKEND="goes into STRUCTURED_OUTPUTS_CONFIG"),
    *_options(
        REVISION="main", CODE_REVISION="", TOKENIZER="", TOKENIZER_REVISION="main", TOKENIZER_MODE="auto",
        SKIP_TOKENIZER_INIT="false", TRUST_REMOTE_CODE="false", DOWNLOAD_DIR="", LOAD_FORMAT="auto",
        CONFIG_FORMAT="auto", DTYPE="auto", KV_CACHE_DTYPE="auto", QUANTIZATION="", MAX_MODEL_LEN="auto",
        SEED="0", HF_OVERRIDES="", IGNORE_PATTERNS="original/**/*", MODEL_LOADER_EXTRA_CONFIG="",
        LIMIT_MM_PER_PROMPT="", MM_PROCESSOR_KWARGS="", MEDIA_IO_KWARGS="", SERVED_MODEL_NAME="",
        HF_CONFIG_PATH="",
    ),
    _obsolete("QUANTIZATION_PARAM_PATH", "scales lie in the checkpoint now; KV_CACHE_DTYPE=fp8 uses them"),
    _obsolete("TRANSFORMERS_VERSION", "packages are not changed at the start; build an image with another"),
)  # fmt: skip

_PARALLELISM_AND_SCHEDULING: Final = (
    *_options(
        TENSOR_PARALLEL_SIZE="1", PIPELINE_PARALLEL_SIZE="1", DATA_PARALLEL_SIZE="1",
        DATA_PARALLEL_SIZE_LOCAL="", ENABLE_EXPERT_PARALLEL="false",
        DISTRIBUTED_EXECUTOR_BACKEND="mp", RAY_WORKERS_USE_NSIGHT="false",
        DISABLE_CUSTOM_ALL_REDUCE="false", GPU_MEMORY_UTILIZATION="0.95", BLOCK_SIZE="16",
        CPU_OFFLOAD_GB="0", ENFORCE_EAGER="false",
        ENABLE_PREFIX_CACHING="false", ENABLE_CHUNKED_PREFILL="true", DISABLE_SLIDING_WINDOW="false",
        NUM_GPU_BLOCKS_OVERRIDE="", MAX_NUM_BATCHED_TOKENS="", MAX_NUM_SEQS="256", MAX_LOGPROBS="20",
        ASYNC_SCHEDULING="", STREAM_INTERVAL="1", ATTENTION_BACKEND="", COMPILATION_CONFIG="",
        KV_CACHE_MEMORY_BYTES="", KV_TRANSFER_CONFIG="", OTLP_TRACES_ENDPOINT="",
    ),
    _alias("NUM_GPU_SHARD", "TENSOR_PARALLEL_SIZE", weak=True),
    _alias("VLLM_ATTENTION_BACKEND", "ATTENTION_BACKEND", weak=True),
    *_parts("DISTRIBUTED_EXECUTOR_BACKEND", WORKER_USE_RAY="true means DISTRIBUTED_EXECUTOR_BACKEND=ray"),
    *_parts("TENSOR_PARALLEL_SIZE", TENSOR_PARALLEL_AUTO="0: TENSOR_PARALLEL_SIZE=1 is meant literally"),
    *_parts("MAX_LOGPROBS", MAX_BEAM_WIDTH="MAX_LOGPROBS becomes at least twice as much"),
    _worker("CUDA_VISIBLE_DEVICES", note="tells how many GPUs there are; the engine sees it too"),
    Variable(
        name="MAX_PARALLEL_LOADING_WORKERS",
        kind=Kind.OBSOLETE,
        default="1",
        note="vLLM takes it and ignores it; SAFETENSORS_LOAD_STRATEGY decides how weights are read",
        gone=True,
        quiet=frozenset({"0", "1"}),
    ),
    Variable(
        name="DEVICE",
        kind=Kind.OBSOLETE,
        default="auto",
        note="the device is chosen by the vLLM build",
        quiet=frozenset({"auto", "cuda"}),
    ),
    Variable(
        name="SCHEDULER_DELAY_FACTOR",
        kind=Kind.OBSOLETE,
        default="0",
        note="removed from vLLM without a replacement; MAX_NUM_SEQS and MAX_NUM_BATCHED_TOKENS bound a step",
        quiet=frozenset({"0", "0.0"}),
    ),
    _obsolete("SWAP_SPACE", "removed from vLLM; the nearest is KV_OFFLOADING_SIZE", "4"),
    _obsolete("MAX_SEQ_LEN_TO_CAPTURE", "graphs go by batch size now: MAX_CUDAGRAPH_CAPTURE_SIZE", "8192"),
    _obsolete("MAX_CONTEXT_LEN_TO_CAPTURE", "graphs go by batch size: MAX_CUDAGRAPH_CAPTURE_SIZE", "8192"),
    _obsolete("CUDA_GRAPH_SIZES", "use CUDAGRAPH_CAPTURE_SIZES"),
    _obsolete("USE_V2_BLOCK_MANAGER", "removed from vLLM, which always works this way", "false"),
    _obsolete("NUM_LOOKAHEAD_SLOTS", "removed from vLLM; NUM_SPECULATIVE_TOKENS alone decides", "0"),
    _obsolete("NUM_SCHEDULER_STEPS", "removed from vLLM; the nearest is ASYNC_SCHEDULING", "1"),
    _obsolete("PREEMPTION_MODE", "removed from vLLM, which always computes again"),
    _obsolete("PREEMPTION_CHECK_PERIOD", "never had an effect in vLLM's releases; leave it out", "1.0"),
    _obsolete("PREEMPTION_CPU_CAPACITY", "never had an effect in vLLM's releases; leave it out", "2"),
    _obsolete("TOKENIZER_POOL_SIZE", "removed from vLLM; the nearest is RENDERER_NUM_WORKERS", "0"),
    _obsolete("TOKENIZER_POOL_TYPE", "removed from vLLM; the nearest is RENDERER_NUM_WORKERS", "ray"),
    _obsolete("TOKENIZER_POOL_EXTRA_CONFIG", "removed from vLLM; the nearest is RENDERER_NUM_WORKERS"),
    _obsolete("MAX_NUM_PARTIAL_PREFILLS", "removed from vLLM; the nearest is LONG_PREFILL_TOKEN_THRESHOLD"),
    _obsolete("MAX_LONG_PARTIAL_PREFILLS", "removed from vLLM; the nearest is LONG_PREFILL_TOKEN_THRESHOLD"),
    _obsolete("NUM_REDUNDANT_EXPERTS", "use EPLB_CONFIG with num_redundant_experts"),
    _obsolete("CALCULATE_KV_SCALES", "removed from vLLM; scales lie in the checkpoint"),
    _obsolete("OVERRIDE_ATTENTION_DTYPE", "removed from vLLM; the nearest is ATTENTION_CONFIG"),
    _obsolete("OVERRIDE_POOLER_CONFIG", "use POOLER_CONFIG"),
    *_all(
        Kind.ENGINE,
        "VLLM_USE_DEEP_GEMM PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF",
        "the engine reads it itself",
    ),
)  # fmt: skip

_ADAPTERS: Final = (
    *_options(
        ENABLE_LORA="false", LORA_MODULES="[]", MAX_LORAS="1", MAX_LORA_RANK="16", MAX_CPU_LORAS="",
        LORA_DTYPE="auto", FULLY_SHARDED_LORAS="false", DEFAULT_MM_LORAS="",
    ),
    _obsolete("LORA_EXTRA_VOCAB_SIZE", "removed from vLLM: adapters bring no words of their own", "256"),
    _obsolete("LONG_LORA_SCALING_FACTORS", "removed from vLLM; the nearest is rope_scaling in HF_OVERRIDES"),
    _obsolete("ENABLE_LORA_BIAS", "removed from vLLM: adapters with a bias are not served"),
    _obsolete("ENABLE_PROMPT_ADAPTER", "removed from vLLM; use LoRA adapters (LORA_MODULES)", "false"),
    _obsolete("MAX_PROMPT_ADAPTERS", "removed from vLLM; use LoRA adapters (LORA_MODULES)", "1"),
    _obsolete("MAX_PROMPT_ADAPTER_TOKEN", "removed from vLLM; use LoRA adapters (LORA_MODULES)", "0"),
    _obsolete("QLORA_ADAPTER_NAME_OR_PATH", "removed from vLLM; use LORA_MODULES"),
)  # fmt: skip

_SPECULATIVE_DECODING: Final = (
    *_options(SPECULATIVE_CONFIG="", SPEC_METHOD="", SPEC_MODEL="", SPEC_TOKENS=""),
    *_parts(
        "SPECULATIVE_CONFIG",
        SPECULATIVE_METHOD="method of SPECULATIVE_CONFIG",
        SPECULATIVE_MODEL="model of SPECULATIVE_CONFIG",
        NUM_SPECULATIVE_TOKENS="num_speculative_tokens of SPECULATIVE_CONFIG",
        NGRAM_PROMPT_LOOKUP_MAX="prompt_lookup_max of SPECULATIVE_CONFIG",
        NGRAM_PROMPT_LOOKUP_MIN="prompt_lookup_min of SPECULATIVE_CONFIG",
        SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE="draft_tensor_parallel_size of SPECULATIVE_CONFIG",
        SPECULATIVE_MAX_MODEL_LEN="max_model_len of SPECULATIVE_CONFIG",
        SPECULATIVE_QUANTIZATION="quantization of SPECULATIVE_CONFIG",
        SPECULATIVE_MODEL_REVISION="revision of SPECULATIVE_CONFIG",
        SPECULATIVE_ENFORCE_EAGER="enforce_eager of SPECULATIVE_CONFIG",
    ),
    _obsolete(
        "SPECULATIVE_DISABLE_BY_BATCH_SIZE",
        "removed from vLLM; the nearest is num_speculative_tokens_per_batch_size in SPECULATIVE_CONFIG",
    ),
    _obsolete(
        "SPEC_DECODING_ACCEPTANCE_METHOD",
        "removed from vLLM; the nearest is rejection_sample_method in SPECULATIVE_CONFIG",
        "rejection_sampler",
    ),
    _obsolete("TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_THRESHOLD", "its sampler was removed; leave it out"),
    _obsolete("TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_ALPHA", "its sampler was removed; leave it out"),
    _obsolete("DISABLE_LOGPROBS_DURING_SPEC_DECODING", "removed from vLLM, which always gives them"),
)  # fmt: skip

_NATIVE: Final = (
    _number("DEFAULT_BATCH_SIZE", "50", 1),
    _number("DEFAULT_MIN_BATCH_SIZE", "1", 0),
    _number("DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "3", 0),
    _number("MIN_BATCH_SIZE", "1", 0),
    _number("BATCH_SIZE_GROWTH_FACTOR", "3", 0),
    _choice("NATIVE_STREAM_FORMAT", "tokens", "sse"),
    _number("DEFAULT_MAX_TOKENS", "16", 1, "auto"),
    _choice("NATIVE_SAMPLING_DEFAULTS", "documented", "model"),
    _choice("NATIVE_CHAT_MODE", "chat", "raw"),
    _number("STREAM_FLUSH_INTERVAL_MS", "0", 0),
    _switch("OPENAI_STRICT_PASSTHROUGH", "false"),
    _switch("ALLOW_ADMIN_ROUTES", "false"),
    _switch("STRICT_PARAMS", "false"),
    *_all(Kind.IGNORED, "BATCH_SIZE", "use DEFAULT_BATCH_SIZE, or max_batch_size in the job's input"),
)

_OPENAI: Final = (
    _switch("RAW_OPENAI_OUTPUT", "true"),
    _alias("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "SERVED_MODEL_NAME"),
    _alias("OPENAI_RESPONSE_ROLE", "RESPONSE_ROLE", "assistant"),
    *_options(
        ENABLE_AUTO_TOOL_CHOICE="false", TOOL_CALL_PARSER="", TOOL_PARSER_PLUGIN="", REASONING_PARSER="",
        TRUST_REQUEST_CHAT_TEMPLATE="false", RETURN_TOKENS_AS_TOKEN_IDS="false",  # noqa: S106 - no password
        EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE="false", ENABLE_PROMPT_TOKENS_DETAILS="false",
        ENABLE_FORCE_INCLUDE_USAGE="false", ENABLE_LOG_OUTPUTS="false", LOG_ERROR_STACK="false",
    ),
    Variable(
        name="ENABLE_REASONING",
        kind=Kind.OBSOLETE,
        default="false",
        note="REASONING_PARSER alone is sufficient",
        quiet=frozenset({"false", "0"}),
    ),
    *_all(Kind.IGNORED, "ALLOW_OPENAI_FORMAT", "the OpenAI routes are always there"),
)  # fmt: skip

_PROCESS: Final = (
    _number("MAX_CONCURRENCY", "30", 1, "auto", whole=True),
    _number("REQUEST_TIMEOUT", "3600", 0.1),
    _number("VLLM_STARTUP_TIMEOUT", "1200", 0.1),
    _number("DRAIN_TIMEOUT", "30", 0),
    _number("PLATFORM_LOST_TIMEOUT", "60", 1),
    _choice("WORKER_MODE", "queue", "http"),
    _choice("FLASHBOOT_SLEEP_LEVEL", "1", "2"),
    _number("PORT", "80", 1, maximum=65_535, whole=True),
    _number("PORT_HEALTH", "80", 1, maximum=65_535, whole=True),
    _worker("HEALTH_CHECK_PATH", "/ping"),
    _worker("VLLM_EXTRA_ARGS", note="its arguments follow those made of variables"),
    _worker("VLLM_CONFIG_FILE", "/vllm_config.yaml", note="becomes --config"),
    *_options(DISABLE_LOG_STATS="false", ENABLE_LOG_REQUESTS="false", MAX_LOG_LEN=""),
    *_parts(
        "ENABLE_LOG_REQUESTS",
        DISABLE_LOG_REQUESTS="requests are only logged with ENABLE_LOG_REQUESTS=true",
        DISABLE_LOGGING_REQUEST="requests are only logged with ENABLE_LOG_REQUESTS=true",
    ),
    _worker("VLLM_INTERNAL_PORT", "8000", "not needed: the engine is reached through a Unix socket"),
    _worker("VLLM_PORT", "8000", "not needed, and kept from the engine: a Unix socket leads to it"),
    _worker("VLLM_BASE_URL", note="not needed: the engine is reached through a Unix socket"),
    *_all(
        Kind.KEPT_BACK,
        "VLLM_API_KEY",
        "kept from the engine, which gets a key of the worker's own; clients use the platform's",
    ),
    *_all(Kind.KEPT_BACK, "VLLM_VERSION VLLM_NIGHTLY", "of the image's build, kept from the engine"),
    _obsolete("WORKER_CUDA_VERSION", "CUDA follows the image's base; set VLLM_VERSION at the build"),
    _obsolete("BASE_IMAGE_VERSION", "the base follows VLLM_VERSION at the build"),
)  # fmt: skip

_STORAGE: Final = (
    Variable(name="BASE_PATH", kind=Kind.STORAGE, default="/runpod-volume", note="root of the model cache"),
    *_all(
        Kind.STORAGE,
        "HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_DATASETS_CACHE",
        "where models are kept; worker and engine follow it",
    ),
    *_all(
        Kind.STORAGE,
        "HF_HUB_ENABLE_HF_TRANSFER",
        "1 becomes HF_XET_HIGH_PERFORMANCE=1, today's fast download",
    ),
    *_all(Kind.STORAGE, "HUGGING_FACE_HUB_TOKEN", "becomes HF_TOKEN where that is not set"),
    *_all(Kind.ENGINE, "HF_TOKEN", "passed on in the environment, never on the command line"),
    *_all(
        Kind.ENGINE,
        "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE TOKENIZERS_PARALLELISM RAYON_NUM_THREADS",
        "passed on in the environment",
    ),
    _worker("ENGINE_VERSION", note="which of the installed engines; the setting engine.homes lists them"),
    _worker("EXTRA_REPOS", note="further repositories that the worker program fetches"),
    *_all(
        Kind.IGNORED,
        "MODEL_CACHE_ENABLE",
        "a complete snapshot in the cache is always used; HF_HUB_OFFLINE=1 allows nothing else",
    ),
    *_all(
        Kind.IGNORED,
        "TENSORIZE TENSORIZER_NUM_GPUS TENSORIZE_MODEL TENSORIZER_URI",
        "use LOAD_FORMAT=tensorizer with MODEL_LOADER_EXTRA_CONFIG",
    ),
)

_UNMAPPED: Final = (
    *_all(
        Kind.UNMAPPED,
        "HOST UDS API_KEY MODEL_TAG CONFIG HEADLESS HELP FD",
        "not mapped: the worker program decides this option",
    ),
    *_all(
        Kind.UNMAPPED,
        "MASTER_ADDR MASTER_PORT NODE_RANK NNODES NUM_NODES NUM_TRAINERS LOG_LEVEL ROOT_PATH MIDDLEWARE GRPC "
        "GRPC_PORT ENABLE_SSL_REFRESH LOGGING_CONFIG LOG_CONFIG_FILE TOKENS_ONLY",
        "not mapped, because orchestrators set it for other purposes; VLLM_EXTRA_ARGS can set the option",
    ),
)

_DEAD: Final = (
    *_all(Kind.IGNORED, "MODEL", "use MODEL_NAME"),
    *_all(Kind.IGNORED, "MODEL_BASE_PATH RUNPOD_HUGGINGFACE_CACHE", "use BASE_PATH or HF_HUB_CACHE"),
    *_all(Kind.IGNORED, "STREAMING", "a job's input says whether it streams"),
    *_all(Kind.IGNORED, "USE_FULL_METRICS", "every answer has its usage"),
    *_all(Kind.IGNORED, "USE_TENSOR_PARALLEL", "use TENSOR_PARALLEL_SIZE"),
    *_all(
        Kind.IGNORED,
        "USE_HF_CHAT_TEMPLATE",
        "the tokenizer's template is the default; use CUSTOM_CHAT_TEMPLATE",
    ),
    *_all(Kind.IGNORED, "CONCURRENCY_MODIFIER", "use MAX_CONCURRENCY"),
    *_all(Kind.IGNORED, "DOWNLOAD_7B_MODEL DOWNLOAD_13B_MODEL TESTING_DOWNLOAD", "use MODEL_NAME"),
)

GROUPS: Final[Mapping[str, tuple[Variable, ...]]] = {
    "Model and tokenizer": _MODEL_AND_TOKENIZER,
    "Parallelism, memory, scheduling": _PARALLELISM_AND_SCHEDULING,
    "Adapters": _ADAPTERS,
    "Speculative decoding": _SPECULATIVE_DECODING,
    "Native jobs": _NATIVE,
    "OpenAI routes": _OPENAI,
    "Process": _PROCESS,
    "Storage and download": _STORAGE,
    "Not mapped": _UNMAPPED,
    "Dead names": _DEAD,
}
"""The rows by subject, as the contract has them."""

VARIABLES: Final[Mapping[str, Variable]] = {
    variable.name: variable for group in GROUPS.values() for variable in group
}
"""Every name, with what the contract says of it."""

PREFIX_FORM: Final = "VLLM_RUNPOD_"
"""Beginning of a variable that means the option named by the rest (§4.9, dead names)."""

_FAMILIES: Final = (
    ("DOCKERHUB_", Kind.IGNORED, "only a secret of an image's build"),
    ("RUNPOD_", Kind.PLATFORM, "the platform's; kept from the engine"),
    ("PILOTLIGHT_", Kind.PLATFORM, "the platform's; kept from the engine"),
    ("BUCKET_", Kind.PLATFORM, "the platform's; kept from the engine"),
    ("SSL_", Kind.UNMAPPED, "not mapped; the option can be set by VLLM_EXTRA_ARGS"),
    ("VLLM_", Kind.ENGINE, "the engine reads it itself"),
)
"""Whose a name is by its beginning, where it has no row of its own."""

_WHOLE_NAMES: Final = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR"})
"""OpenSSL's own, which are nobody's options."""

FOREIGN: Final = (
    "SSL_",
    "PYTHON",
    "TORCH_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "RAY_ADDRESS",
    *(name for name, *_ in _FAMILIES),
)
"""Beginnings of names that belong to other programs; never taken for misspelt options."""


def describe(name: str) -> Variable | None:
    """What the contract says of a variable, by its name or by its beginning; None for a stranger's."""
    if name in VARIABLES:
        return VARIABLES[name]
    for beginning, kind, note in _FAMILIES:
        if name.startswith(beginning) and name not in _WHOLE_NAMES:
            hidden = kind in {Kind.PLATFORM, Kind.IGNORED} or is_secret_name(name)
            return Variable(name=name, kind=kind, note=note, secret=hidden)
    return None


def may_be_prefixed(name: str) -> bool:
    """Whether a variable of the table is an option or becomes one, so that it has a prefix form (§4.9)."""
    row = VARIABLES.get(name)
    return row is not None and row.kind in {Kind.OPTION, Kind.ALIAS, Kind.PART}


def obsolete_option(option: str) -> Variable | None:
    """What to know of an option that vLLM no longer has, by its name in capitals; None if nothing is."""
    row = VARIABLES.get(option)
    if row is not None and row.kind is Kind.OBSOLETE:
        return row
    return _OPTIONS_GONE.get(option)


_OPTIONS_GONE: Final[Mapping[str, Variable]] = {
    row.name: row
    for row in (
        _obsolete("TASK", "use --runner and --convert"),
        _obsolete("ROPE_SCALING", "use --hf-overrides with rope_scaling"),
        _obsolete("ROPE_THETA", "use --hf-overrides with rope_theta"),
        _obsolete("WORKER_USE_RAY", "use --distributed-executor-backend ray"),
        _obsolete("DISABLE_LOG_REQUESTS", "requests are not logged without --enable-log-requests"),
        *(
            _obsolete(name, "use --structured-outputs-config")
            for name in (
                "GUIDED_DECODING_BACKEND",
                "GUIDED_DECODING_DISABLE_FALLBACK",
                "GUIDED_DECODING_DISABLE_ANY_WHITESPACE",
                "GUIDED_DECODING_DISABLE_ADDITIONAL_PROPERTIES",
            )
        ),
    )
}
"""Options of earlier versions whose variables have a meaning of their own here (§4.10)."""
