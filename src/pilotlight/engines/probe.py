"""Asks an installed vLLM what it understands, and prints the answer as JSON.

This is the one file of Pilotlight that imports vLLM, and it is never imported by the rest: the *engine's*
Python runs it as a script (`<engine>/bin/python -I probe.py [--output FILE]`), once, after an installation.
`manifest` reads the result. Nothing but the standard library and vLLM may be imported here.

Method and costs: vllm-worker.md §4.3 (10 s, 570 MB; which is why the answer is stored).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FORMAT = 2
"""Of the manifest; `manifest.MANIFEST_FORMAT` is the same number."""

PARSER_FACTORIES = (
    "vllm.entrypoints.launchers.cli_args:make_arg_parser",  # 0.29 and later
    "vllm.entrypoints.openai.cli_args:make_arg_parser",  # 0.28 and earlier
)
PARSER_CLASSES = (
    "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "vllm.utils:FlexibleArgumentParser",
)
KINDS = {"BooleanOptionalAction": "pair", "_StoreTrueAction": "switch", "_AppendAction": "repeat"}
REGISTRIES = {
    "QUANTIZATION": ("vllm.model_executor.layers.quantization:QUANTIZATION_METHODS",),
    "LOAD_FORMAT": ("vllm.model_executor.model_loader:_LOAD_FORMAT_TO_MODEL_LOADER",),
    "TOOL_CALL_PARSER": (
        "vllm.tool_parsers:ToolParserManager",
        "vllm.entrypoints.openai.tool_parsers:ToolParserManager",
    ),
    "REASONING_PARSER": ("vllm.reasoning:ReasoningParserManager",),
}
"""Where vLLM keeps the values of options that plugins can add to, by the option's name."""


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    activations = inputs and {"strategy": "token", "dynamic": True, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"symmetric": True, "dynamic": False, **weights},
                "input_activations": activations and {"symmetric": True, **activations},
            }
        },
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}
_INT8 = {"type": "int", "num_bits": 8, "strategy": "channel"}
_FLOAT8 = {"type": "float", "num_bits": 8, "strategy": "channel"}
_FLOAT4 = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
QUANTIZED = {
    "awq 4-bit": _AWQ,
    "awq 8-bit": _AWQ | {"bits": 8},
    "gptq 2-bit": _GPTQ | {"bits": 2},
    "gptq 3-bit": _GPTQ | {"bits": 3},
    "gptq 4-bit": _GPTQ,
    "gptq 4-bit act-order": _GPTQ | {"desc_act": True},
    "gptq 4-bit asymmetric": _GPTQ | {"sym": False},
    "gptq 8-bit": _GPTQ | {"bits": 8},
    "compressed-tensors int w4a16": _compressed("pack-quantized", _INT4),
    "compressed-tensors int w8a16": _compressed("pack-quantized", _INT8),
    "compressed-tensors int w8a8": _compressed("int-quantized", _INT8, _INT8 | {"strategy": "token"}),
    "compressed-tensors float w8a16": _compressed("float-quantized", _FLOAT8),
    "compressed-tensors float w8a8": _compressed("float-quantized", _FLOAT8, _FLOAT8 | {"strategy": "token"}),
    "compressed-tensors float w4a16": _compressed("nvfp4-pack-quantized", _FLOAT4),
    "compressed-tensors float w4a4": _compressed(
        "nvfp4-pack-quantized", _FLOAT4, _FLOAT4 | {"dynamic": "local"}
    ),
    "fp8": _FP8,
    "fp8 block": _FP8 | {"weight_block_size": [128, 128]},
    "mxfp8": {"quant_method": "mxfp8", "quant_algo": "MXFP8"},
    "torchao": {"quant_method": "torchao"},
}
"""An example of each form that is common among checkpoints; `models.quantization` names them alike."""
TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16",
}  # fmt: skip
"""The least that vLLM makes a configuration of."""


def load(*names: str) -> Any:
    """The first of the named attributes ("module:attribute") that this vLLM has."""
    for name in names:
        module, attribute = name.split(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    sys.exit("this vLLM has none of " + ", ".join(names) + "; pilotlight does not know this version")


def describe_flags(parser: argparse.ArgumentParser) -> dict[str, dict[str, object]]:
    """Every long option of the parser, by its upper-case name."""
    flags: dict[str, dict[str, object]] = {}
    for action in parser._actions:  # noqa: SLF001  argparse has no public way to list options
        for option in action.option_strings:
            if option.startswith("--") and not option.startswith("--no-"):
                flags[option[2:].replace("-", "_").upper()] = {
                    "flag": option,
                    "kind": KINDS.get(type(action).__name__, "value"),
                    "value": describe_value(action.type),
                    "short": [name for name in action.option_strings if not name.startswith("--")],
                    "multi": action.nargs in {"+", "*"},
                    "choices": [str(choice) for choice in action.choices] if action.choices else None,
                }
    return flags


def describe_value(convert: Callable[[str], object] | argparse.FileType | str | None) -> str:
    """What an option takes, found out by trying: its parser names functions, not types."""
    if not callable(convert):
        return "text"

    def takes(text: str) -> bool:
        try:
            convert(text)
        except (argparse.ArgumentTypeError, TypeError, ValueError):
            return False
        return True

    if takes("x"):
        return "text"
    if takes("[1]") or takes("{}"):
        return "json"
    if takes("1k"):
        return "size"
    if takes("0.5"):
        return "number"
    # What takes neither a word nor a number is an object with members that must be there.
    return "integer" if takes("7") else "json"


def describe_registries() -> dict[str, list[str]]:
    """The values that plugins can add to, those of installed plugins included.

    What this vLLM does not have is left out.
    """
    found: dict[str, list[str]] = {}
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("vllm.plugins").load_general_plugins()
    for option, names in REGISTRIES.items():
        for name in names:
            module, attribute = name.split(":")
            with contextlib.suppress(ImportError, AttributeError):
                registry = getattr(importlib.import_module(module), attribute)
                values = registry.list_registered() if hasattr(registry, "list_registered") else registry
                found[option] = sorted(str(value) for value in values)
                break
    executors = ["external_launcher", "mp", "uni"]
    found["DISTRIBUTED_EXECUTOR_BACKEND"] = [*executors, *(["ray"] if find_spec("ray") else [])]
    return found


def pin_platform(torch: Any) -> None:
    """Let a build for GPUs be asked where there is none, as on machines that build images.

    vLLM finds no platform there, and its parser wants one.
    """
    if torch.version.cuda and not torch.cuda.is_available():
        platforms: Any = importlib.import_module("vllm.platforms")
        platforms.current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()


def describe_quantizations(platform: str) -> dict[str, str]:
    """By form of the weights why this engine cannot run them here; "" where it can.

    vLLM has no list of this: whether there is a kernel for this machine shows when a layer is made. So for
    each form one is made, and on a CPU run once, in a process of its own, since some kernels crash. A form
    whose example this vLLM does not understand is left out, like all of them if the ways to try have changed.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as folder:
        config = importlib.import_module("vllm.config")
        for name in ("layers.linear", "layers.quantization"):
            importlib.import_module(f"vllm.model_executor.{name}")
        (Path(folder) / "config.json").write_text(json.dumps(TINY_MODEL), encoding="utf-8")
        model = config.ModelConfig(model=folder, skip_tokenizer_init=True)
        with config.set_current_vllm_config(config.VllmConfig(model_config=model)):
            for form, example in QUANTIZED.items():
                reason = in_child(try_quantized, example, platform, f"file://{folder}/{len(found)}{form}")
                if reason is not None:
                    found[form] = reason
    return found


def in_child(function: Callable[..., str], *arguments: object) -> str | None:
    """What the function returns in a forked process; None if it raises or crashes."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), os.fdopen(sender, "w") as file:
            json.dump(function(*arguments), file)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def try_quantized(example: dict[str, Any], platform: str, rendezvous: str) -> str:
    """Makes the fused layer of a model with such weights; the reason why that fails, "" if it does not."""
    torch = importlib.import_module("torch")
    torch._dynamo.config.disable = True  # noqa: SLF001  compiling takes seconds and decides nothing
    distributed = importlib.import_module("vllm.distributed")
    distributed.init_distributed_environment(1, 0, rendezvous, 0, "gloo")
    distributed.ensure_model_parallel_initialized(1, 1)
    method = str(example["quant_method"])
    methods = importlib.import_module("vllm.model_executor.layers.quantization")
    linear = importlib.import_module("vllm.model_executor.layers.linear").MergedColumnParallelLinear
    try:
        importlib.import_module("vllm.platforms").current_platform.verify_quantization(method)
        quant = methods.get_quantization_config(method).from_config(dict(example))
        quant.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        with torch.device("cpu" if platform == "cpu" else "meta"):
            layer = linear(
                256, [256, 256], bias=False, quant_config=quant, params_dtype=torch.bfloat16,
                prefix="model.layers.0.mlp.gate_up_proj",
            )  # fmt: skip
        if platform == "cpu":
            for parameter in layer.parameters():
                parameter.data.fill_(1)
            layer.quant_method.process_weights_after_loading(layer)
            layer(torch.ones(2, 256, dtype=torch.bfloat16))
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()).removesuffix(" Reasons:") or type(error).__name__
    return ""


def probe() -> dict[str, object]:
    """What the vLLM of this Python is and accepts; takes about ten seconds, most of them its import."""
    vllm = importlib.import_module("vllm")
    torch = importlib.import_module("torch")
    pin_platform(torch)
    parser = load(*PARSER_CLASSES)(prog="vllm serve", add_help=False)
    load(*PARSER_FACTORIES)(parser)
    registry = importlib.import_module("vllm.model_executor.models").ModelRegistry
    registered = describe_registries()
    platform = "cuda" if torch.version.cuda else "cpu"
    return {
        "format": FORMAT,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "platform": platform,
        "flags": describe_flags(parser),
        "registered": registered,
        "quantizations": describe_quantizations(platform),
        "architectures": sorted(registry.get_supported_archs()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the manifest, or write it to `--output` in one step; vLLM's own messages go to stderr."""
    options = argparse.ArgumentParser(prog="probe.py", description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, help="file to replace with the manifest (default: print it)")
    output: Path | None = options.parse_args(arguments).output
    # Nothing is reported home or fetched, and the log stays empty unless something is wrong.
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        text = json.dumps(probe(), sort_keys=True, indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
        return 0
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
