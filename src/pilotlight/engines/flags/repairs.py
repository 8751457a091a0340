"""What older templates send, made into what the installed vLLM takes (`vllm-worker.md` §4.5, §4.8).

Each repair is one function over the draft; `REPAIRS` is their order. A repair that changes or drops something
leaves one sentence for the log. Sizes, adapters and speculative decoding have their own functions below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pilotlight.core.variables import is_formal_share
from pilotlight.engines.flags.draft import Draft
from pilotlight.engines.flags.lora import ADAPTER_CONFIG, lora_modules, rank_of
from pilotlight.engines.flags.plan import Source
from pilotlight.engines.flags.speculative import PARTS, SHORT_OPTIONS, speculative_parts
from pilotlight.engines.flags.values import (
    choices_problem,
    compact,
    is_integer,
    is_number,
    is_zero,
    parse_boolean,
    parse_config,
    parse_object,
    split_list,
)
from pilotlight.engines.flags.variables import VARIABLES

CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"

STRUCTURED_BACKENDS: Final = ("auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer")

VLLM_MAX_LOGPROBS: Final = 20
LOGPROBS_MAX: Final = 1_000_000_000
"""Logprobs, and twice the width of a beam, stay below; the worker program reads no larger numbers."""
VLLM_MAX_LORA_RANK: Final = 16

_TASKS: Final = {
    "embed": ("pooling", "embed"),
    "embedding": ("pooling", "embed"),
    "classify": ("pooling", "classify"),
    "score": ("pooling", "classify"),
    "reward": ("pooling", None),
    "generate": ("generate", None),
    "auto": (None, None),
}
"""Runner and conversion of each task that older versions knew."""

_PLUGINS: Final = {"bitsandbytes": "vllm-bnb-plugin", "gguf": "vllm-gguf-plugin"}
"""Methods that left vLLM in 0.28 for packages of their own."""


def _memory_share(draft: Draft) -> None:
    """What forms send to every endpoint is no wish on a CPU, where it is a share of the host's memory."""
    setting = draft.settings.get("GPU_MEMORY_UTILIZATION")
    platform = draft.manifest.platform if draft.manifest is not None else ""
    if setting is not None and is_formal_share(draft.text("GPU_MEMORY_UTILIZATION"), platform):
        note = "the forms' 0.95 counts as not set on a CPU, where it is a share of the host's memory"
        draft.drop("GPU_MEMORY_UTILIZATION", note, quiet=True)


def _chat_template(draft: Draft) -> None:
    """Inline text goes into a file: the command line stays short, process lists do not show it (§1.4)."""
    template = draft.text("CHAT_TEMPLATE")
    # vLLM takes a value without braces and newlines for a path.
    if template is None or "CHAT_TEMPLATE" not in draft.settings or not any(c in template for c in "{}\n"):
        return
    draft.files[CHAT_TEMPLATE_FILE] = template
    note = "inline text is written to a file"
    draft.amend("CHAT_TEMPLATE", f"{draft.run_folder}/{CHAT_TEMPLATE_FILE}", note, quiet=True)


def _request_logging(draft: Draft) -> None:
    """Requests are never logged without being asked for (§8 A18)."""
    option = "ENABLE_LOG_REQUESTS"
    said = {name: draft.boolean(name) for name in ("DISABLE_LOG_REQUESTS", "DISABLE_LOGGING_REQUEST")}
    disabling = [name for name, disabled in said.items() if disabled]
    if draft.given(option):
        enabled = parse_boolean(draft.final(option) or "") is True
        for name in disabling:
            draft.ignore(name, f"{name} is ignored: {option} is set too and wins", quiet=not enabled)
    elif disabling:
        draft.put(option, False, *disabling)
    for name, disabled in said.items():
        if disabled is False:
            draft.ignore(name, VARIABLES[name].note, quiet=True)
    _output_logging(draft)


def _output_logging(draft: Draft) -> None:
    """Outputs are logged together with requests or not at all, else vLLM refuses."""
    option, needed = "ENABLE_LOG_OUTPUTS", "ENABLE_LOG_REQUESTS"
    if parse_boolean(draft.final(option) or "") is not True:
        return
    makers = draft.makers(option, "VLLM_CONFIG_FILE")
    if not draft.given(needed):
        draft.put(needed, True, *makers, note="implied by ENABLE_LOG_OUTPUTS")
    elif parse_boolean(draft.final(needed) or "") is False:
        _switch_off(draft, option, "requests are not logged, and vLLM logs no outputs without them")


def _switch_off(draft: Draft, option: str, reason: str) -> None:
    """Take a switch back that vLLM would refuse; who gives raw arguments is told instead."""
    if option in draft.extra:
        draft.fail_option(option, f"cannot be used: {reason}")
    elif option in draft.settings:
        draft.drop(option, f"{option} is ignored: {reason}")
    else:
        note = f"{option} in the configuration file is ignored: {reason}"
        draft.put(option, False, "VLLM_CONFIG_FILE", note=note)
        draft.notes.append(note)


def _tools(draft: Draft) -> None:
    chosen = parse_boolean(draft.final("ENABLE_AUTO_TOOL_CHOICE") or "") is True
    if chosen and not draft.given("TOOL_CALL_PARSER"):
        _switch_off(draft, "ENABLE_AUTO_TOOL_CHOICE", "vLLM needs TOOL_CALL_PARSER with it, so set that too")


def _template_values(draft: Draft) -> None:
    """Values that consoles offer and that vLLM lost or renamed."""
    if (draft.text("TOKENIZER_MODE") or "").lower() == "slow" and "TOKENIZER_MODE" in draft.settings:
        note = (
            "TOKENIZER_MODE=slow is ignored: vLLM has no slow tokenizers any more; legal are auto and mistral"
        )
        draft.drop("TOKENIZER_MODE", note)
    if (draft.text("LORA_DTYPE") or "").lower() == "float32" and "LORA_DTYPE" in draft.settings:
        note = "LORA_DTYPE=float32 is ignored: vLLM takes auto, float16 and bfloat16"
        draft.drop("LORA_DTYPE", note)
    if (draft.text("KV_CACHE_DTYPE") or "").lower() == "fp8_e5m2" and "KV_CACHE_DTYPE" in draft.settings:
        draft.amend("KV_CACHE_DTYPE", "fp8", "KV_CACHE_DTYPE=fp8_e5m2 is deprecated: fp8 is used")
    if draft.truth("SKIP_TOKENIZER_INIT"):
        draft.notes.append(
            "SKIP_TOKENIZER_INIT=true: requests must hold token ids; text and messages will not work"
        )


def _limit_mm_per_prompt(draft: Draft) -> None:
    text = draft.text("LIMIT_MM_PER_PROMPT")
    if text is None or "LIMIT_MM_PER_PROMPT" not in draft.settings or parse_object(text) is not None:
        return
    pairs = [pair.partition("=") for pair in split_list(text)]
    if all(name and is_integer(count) for name, _, count in pairs):
        limits = {name: int(count) for name, _, count in pairs}
        draft.amend("LIMIT_MM_PER_PROMPT", compact(limits), "written as JSON", quiet=True)
    else:
        draft.fail_setting("LIMIT_MM_PER_PROMPT", 'must be JSON such as {"image":1}, or image=1,video=0')


def _hf_overrides(draft: Draft) -> None:
    """`ROPE_SCALING` and `ROPE_THETA` go into `HF_OVERRIDES`."""
    text = draft.text("HF_OVERRIDES")
    if text is not None and "HF_OVERRIDES" in draft.settings and parse_object(text) is None:
        draft.fail_setting("HF_OVERRIDES", "must be a JSON object")
        return
    configured = draft.config.get("HF_OVERRIDES")
    overrides: dict[str, Any] = (
        dict(configured) if isinstance(configured, dict) else parse_object(text or "") or {}
    )
    if "HF_OVERRIDES" in draft.settings:
        overrides = parse_object(text or "") or {}
    used = []
    scaling = draft.env.get("ROPE_SCALING")
    if scaling is not None:
        parsed = parse_object(scaling)
        if parsed is None:
            draft.fail(
                "ROPE_SCALING", scaling, 'must be a JSON object such as {"rope_type":"yarn","factor":4}'
            )
        else:
            overrides["rope_scaling"] = parsed
            used.append("ROPE_SCALING")
    theta = draft.env.get("ROPE_THETA")
    if theta is not None:
        if not is_number(theta):
            draft.fail("ROPE_THETA", theta, "must be a number")
        elif float(theta) == 0:
            draft.ignore("ROPE_THETA", "0 means that it is not set", quiet=True)
        else:
            overrides["rope_theta"] = float(theta)
            used.append("ROPE_THETA")
    if used:
        draft.put("HF_OVERRIDES", compact(overrides), *draft.makers("HF_OVERRIDES"), *used)


def _structured_outputs(draft: Draft) -> None:
    backend = draft.env.get("GUIDED_DECODING_BACKEND")
    if backend is None:
        return
    # Older versions took options after a colon, which are options of their own now.
    chosen = backend.lower().partition(":")[0]
    if chosen not in STRUCTURED_BACKENDS:
        problem = choices_problem(chosen, STRUCTURED_BACKENDS)
        draft.fail("GUIDED_DECODING_BACKEND", backend, problem, legal=STRUCTURED_BACKENDS)
        return
    configured = draft.config.get("STRUCTURED_OUTPUTS_CONFIG")
    config = dict(configured) if isinstance(configured, dict) else {}
    if "STRUCTURED_OUTPUTS_CONFIG" in draft.settings:
        parsed = parse_config(draft.text("STRUCTURED_OUTPUTS_CONFIG") or "")
        if parsed is None:
            draft.fail_setting("STRUCTURED_OUTPUTS_CONFIG", "must be a JSON object")
            return
        config = parsed
    if "backend" in config:
        named = config["backend"]
        draft.ignore(
            "GUIDED_DECODING_BACKEND",
            f"GUIDED_DECODING_BACKEND is ignored: STRUCTURED_OUTPUTS_CONFIG names the backend {named}",
            quiet=named == chosen,
        )
        return
    makers = draft.makers("STRUCTURED_OUTPUTS_CONFIG")
    value = compact({**config, "backend": chosen})
    draft.put("STRUCTURED_OUTPUTS_CONFIG", value, *makers, "GUIDED_DECODING_BACKEND")


def _task(draft: Draft) -> None:
    task = draft.env.get("TASK")
    if task is None:
        return
    if task.lower() not in _TASKS:
        legal = tuple(sorted(_TASKS))
        draft.fail("TASK", task, choices_problem(task, legal), legal=legal)
        return
    runner, convert = _TASKS[task.lower()]
    if runner is None:
        draft.ignore("TASK", "auto is what vLLM does by itself", quiet=True)
        return
    draft.put("RUNNER", runner, "TASK")
    if convert is not None:
        draft.put("CONVERT", convert, "TASK")


def _executor(draft: Draft) -> None:
    use_ray = draft.boolean("WORKER_USE_RAY")
    if use_ray:
        draft.put("DISTRIBUTED_EXECUTOR_BACKEND", "ray", "WORKER_USE_RAY")
    elif use_ray is not None:
        draft.ignore("WORKER_USE_RAY", "false is what vLLM does by itself", quiet=True)
    known = draft.registered("DISTRIBUTED_EXECUTOR_BACKEND")
    text = draft.text("DISTRIBUTED_EXECUTOR_BACKEND") or ""
    backend = text.lower()
    if backend in known and backend != text and "DISTRIBUTED_EXECUTOR_BACKEND" in draft.settings:
        draft.amend("DISTRIBUTED_EXECUTOR_BACKEND", backend, f"{text} is written {backend}", quiet=True)
    if backend != "ray":
        return
    if known and "ray" not in known and "DISTRIBUTED_EXECUTOR_BACKEND" in draft.settings:
        names = " and ".join(draft.makers("DISTRIBUTED_EXECUTOR_BACKEND"))
        note = f"{names} asks for Ray, which is not installed with this vLLM: processes (mp) are used"
        draft.drop("DISTRIBUTED_EXECUTOR_BACKEND", note)


def _quantization(draft: Draft) -> None:
    """Methods that are gone or come as plugins; bitsandbytes weights imply their method (§4.5)."""
    model = draft.env.get("MODEL_NAME", "")
    if (draft.text("LOAD_FORMAT") or "").lower() == "bitsandbytes" and not draft.given("QUANTIZATION"):
        makers = draft.makers("LOAD_FORMAT", "VLLM_CONFIG_FILE")
        draft.put("QUANTIZATION", "bitsandbytes", *makers, note="implied by LOAD_FORMAT=bitsandbytes")
    known = draft.registered("QUANTIZATION")
    if known and "gguf" not in known and model.lower().endswith(".gguf"):
        draft.fail("MODEL_NAME", model, _missing_plugin("gguf"))
    for option in ("QUANTIZATION", "LOAD_FORMAT"):
        setting, known = draft.settings.get(option), draft.registered(option)
        if setting is None or not isinstance(setting.value, str):
            continue
        method = setting.value.lower()
        if option == "QUANTIZATION" and method == "squeezellm":
            draft.fail_setting(
                option, "was removed from vLLM; use a checkpoint in awq, gptq or compressed-tensors"
            )
        elif method in _PLUGINS and known and method not in known:
            draft.fail_setting(option, _missing_plugin(method))


def _missing_plugin(method: str) -> str:
    return f"needs the package {_PLUGINS[method]}, which is not installed with this vLLM"


def _registered(draft: Draft) -> None:
    """Values of options to which plugins can add: the ones that the installed vLLM has."""
    plugin_of = {"TOOL_CALL_PARSER": "TOOL_PARSER_PLUGIN", "REASONING_PARSER": "REASONING_PARSER_PLUGIN"}
    for option in ("QUANTIZATION", "LOAD_FORMAT", *plugin_of):
        setting, known = draft.settings.get(option), draft.registered(option)
        if setting is None or not known or not isinstance(setting.value, str) or setting.value in known:
            continue
        if option in plugin_of and draft.given(plugin_of[option]):
            continue
        same = [value for value in known if value.lower() == setting.value.lower()]
        if same:
            draft.amend(option, same[0], f"{setting.value} is written {same[0]}", quiet=True)
        else:
            legal = tuple(sorted(known))
            draft.fail_setting(option, choices_problem(setting.value, legal), legal=legal)


def _beam_width(draft: Draft) -> None:
    """Beam search needs twice as many logprobs as it has beams (§1.7)."""
    limit, width = draft.text("MAX_LOGPROBS"), draft.number("MAX_BEAM_WIDTH")
    if limit is not None and is_integer(limit) and not -1 <= int(limit) < LOGPROBS_MAX:
        draft.fail_option("MAX_LOGPROBS", f"must be from -1 (no limit) to {LOGPROBS_MAX - 1}")
        return
    if width is None:
        return
    if not 0 <= width < LOGPROBS_MAX // 2:
        draft.fail("MAX_BEAM_WIDTH", str(width), f"must be from 0 to {LOGPROBS_MAX // 2 - 1}")
        return
    current = int(limit) if limit is not None and is_integer(limit) else VLLM_MAX_LOGPROBS
    if current < 0 or 2 * width <= current:
        draft.ignore(
            "MAX_BEAM_WIDTH", f"MAX_LOGPROBS is {current} and suffices", source=Source.WORKER, quiet=True
        )
        return
    note = f"raised to twice MAX_BEAM_WIDTH={width}"
    draft.put("MAX_LOGPROBS", str(2 * width), *draft.makers("MAX_LOGPROBS"), "MAX_BEAM_WIDTH", note=note)


def _lora(draft: Draft) -> None:
    """One argument for each adapter; what they need is switched on (§4.8)."""
    text = draft.text("LORA_MODULES")
    if text is None or "LORA_MODULES" not in draft.settings:
        return
    try:
        modules = lora_modules(text)
    except ValueError as error:
        draft.fail_setting("LORA_MODULES", str(error))
        return
    if not modules:
        draft.drop("LORA_MODULES", "there are none", quiet=True)
        return
    makers = draft.makers("LORA_MODULES")
    draft.put("LORA_MODULES", tuple(module.argument for module in modules), *makers)
    enabled = draft.text("ENABLE_LORA")
    if enabled is None and "ENABLE_LORA" not in draft.extra:
        draft.put("ENABLE_LORA", True, *makers, note="implied by LORA_MODULES")
    elif parse_boolean(enabled or "") is False and "ENABLE_LORA" in draft.settings:
        draft.amend(
            "ENABLE_LORA", True, "ENABLE_LORA=false is overruled, because LORA_MODULES names adapters"
        )
    if draft.text("MAX_LORAS") == "0" and "MAX_LORAS" in draft.settings:
        draft.amend("MAX_LORAS", "1", "MAX_LORAS=0 was raised to 1, because LORA_MODULES names adapters")
    _spare_slot(draft, len(modules), makers)
    texts = draft.texts or {}
    ranks = [rank_of(texts.get(f"{module.path.rstrip('/')}/{ADAPTER_CONFIG}", "")) for module in modules]
    largest = max((rank for rank in ranks if rank is not None), default=0)
    asked = draft.text("MAX_LORA_RANK") or str(VLLM_MAX_LORA_RANK)
    if is_integer(asked) and largest > int(asked) and "MAX_LORA_RANK" not in draft.extra:
        note = f"MAX_LORA_RANK is raised from {asked}, because an adapter has the rank {largest}"
        draft.put("MAX_LORA_RANK", str(largest), *(draft.makers("MAX_LORA_RANK") or makers), note=note)
        draft.notes.append(note)


def _spare_slot(draft: Draft, adapters: int, makers: tuple[str, ...]) -> None:
    """One place more than there are adapters, on a CPU.

    vLLM's CPU kernels give a text without an adapter whatever lies in the last place, when it is computed
    together with one that has an adapter (vLLM's pull request 48421). So the last place has to stay empty.
    """
    if draft.manifest is None or draft.manifest.platform != "cpu":
        return
    for option, default in (("MAX_LORAS", "1"), ("MAX_CPU_LORAS", "")):
        asked = draft.text(option) or default
        if is_integer(asked) and int(asked) <= adapters and option not in draft.extra:
            note = f"{option} is raised from {asked} to {adapters + 1}: on a CPU one place must stay empty"
            draft.put(option, str(adapters + 1), *(draft.makers(option) or makers), note=note)


def _lora_rank(draft: Draft) -> None:
    rank, flag = draft.text("MAX_LORA_RANK"), draft.flag("MAX_LORA_RANK")
    if rank is None or "MAX_LORA_RANK" not in draft.settings or flag is None or not flag.choices:
        return
    if rank in flag.choices or not is_integer(rank):
        return
    larger = [choice for choice in flag.choices if is_integer(choice) and int(choice) >= int(rank)]
    if larger:
        chosen = min(larger, key=int)
        draft.amend("MAX_LORA_RANK", chosen, f"MAX_LORA_RANK={rank} was raised to {chosen}")


def _kv_connector(draft: Draft) -> None:
    """LMCache does not work with the hybrid cache manager (§4.5)."""
    option = "DISABLE_HYBRID_KV_CACHE_MANAGER"
    configured = draft.config.get("KV_TRANSFER_CONFIG")
    config = configured if isinstance(configured, dict) else {}
    if "KV_TRANSFER_CONFIG" in draft.settings:
        config = parse_config(draft.text("KV_TRANSFER_CONFIG") or "") or {}
    if config.get("kv_connector") == "LMCacheConnectorV1" and not draft.given(option):
        makers = draft.makers("KV_TRANSFER_CONFIG", "VLLM_CONFIG_FILE")
        draft.put(option, True, *makers, note="implied by the connector LMCacheConnectorV1")


def _speculation(draft: Draft) -> None:
    """`SPECULATIVE_CONFIG`, a file that it names, or the parts; vLLM's own short options yield (§4.7)."""
    parts = {name: text for name, text in draft.env.items() if name in PARTS}
    if draft.given("SPECULATIVE_CONFIG"):
        _speculative_file(draft)
        for name, text in parts.items():
            quiet = is_zero(text) or parse_boolean(text) is False
            draft.ignore(name, f"{name} is ignored: SPECULATIVE_CONFIG wins", quiet=quiet)
    elif parts:
        flag = draft.flag("SPEC_METHOD")
        found = speculative_parts(draft.env, flag.choices or () if flag is not None else ())
        for name, problem in found.errors.items():
            draft.fail(name, draft.env.get(name, ""), problem, legal=())
        for name, note in found.notes.items():
            quiet = parse_boolean(parts[name]) is False
            draft.ignore(name, f"{name} {note}", quiet=quiet)
        for name in parts.keys() - set(found.used) - found.notes.keys():
            draft.ignore(name, "0 means that it is not set", quiet=True)
        if found.config is not None:
            draft.put("SPECULATIVE_CONFIG", compact(found.config), *found.used)
    if draft.given("SPECULATIVE_CONFIG"):
        for option in SHORT_OPTIONS:
            draft.drop(option, f"{option} is ignored: SPECULATIVE_CONFIG wins")
    whole = draft.text("SPECULATIVE_CONFIG")
    if draft.texts is not None or whole is None or whole.startswith("{"):
        return
    if whole.startswith(("[", '"')):
        draft.fail_option("SPECULATIVE_CONFIG", "is neither a JSON object nor the path of a file")
    else:
        draft.drop("SPECULATIVE_CONFIG", "a file, which the worker reads when it starts", quiet=True)


def _speculative_file(draft: Draft) -> None:
    text = draft.text("SPECULATIVE_CONFIG")
    if text is None or "SPECULATIVE_CONFIG" not in draft.settings or text.startswith("{"):
        return
    if draft.texts is None:
        return
    if text not in draft.texts:
        draft.fail_setting("SPECULATIVE_CONFIG", "is neither a JSON object nor a file that can be read")
        return
    parsed = parse_object(draft.texts[text])
    if parsed is None:
        draft.fail_setting("SPECULATIVE_CONFIG", "is a file that does not hold a JSON object")
        return
    draft.amend("SPECULATIVE_CONFIG", compact(parsed), f"read from {text}", quiet=True)


REPAIRS: Final[tuple[Callable[[Draft], None], ...]] = (
    _memory_share,
    _chat_template,
    _request_logging,
    _tools,
    _template_values,
    _limit_mm_per_prompt,
    _hf_overrides,
    _structured_outputs,
    _task,
    _executor,
    _quantization,
    _registered,
    _beam_width,
    _lora,
    _lora_rank,
    _kv_connector,
    _speculation,
)
"""In this order: adapters decide the rank before it is made legal."""
