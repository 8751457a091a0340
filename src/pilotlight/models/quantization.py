"""In which form a checkpoint's weights are stored, in the words of the engine's manifest.

Pure. A method alone does not say whether an engine can run it: vLLM for CPUs takes GPTQ in four bits and not
in eight. So methods and their variants have names of one spelling, here and in `engines/probe.py`, which
tries one example of each on the installed engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_OTHER_NAMES: Final = {
    "auto_awq": "awq",
    "awq_marlin": "awq",
    "auto-round": "inc",
    "auto_gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed_tensors": "compressed-tensors",
}


def forms_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The forms in which weights are stored.

    Args:
        config: The `quantization_config` of a model.

    Returns:
        For example `gptq 4-bit`, `fp8 block`, or one such as `compressed-tensors int w8a8` for each of
        several groups of layers; the method alone where nothing more is known of it; nothing without one.
    """
    method = str(config.get("quant_method") or "").lower()
    method = _OTHER_NAMES.get(method, method)
    if method == "awq":
        return (f"awq {config.get('w_bit') or config.get('bits')}-bit",)
    if method == "gptq":
        form = f"gptq {config.get('bits')}-bit"
        if config.get("sym") is False:
            form += " asymmetric"
        elif config.get("desc_act") is True and config.get("group_size") != -1:
            form += " act-order"
        return (form,)
    if method == "compressed-tensors":
        groups = config.get("config_groups")
        found = [_group_form(group) for group in groups.values()] if isinstance(groups, dict) else []
        return tuple(dict.fromkeys(form for form in found if form)) or (method,)
    if method == "fp8" and config.get("weight_block_size"):
        return ("fp8 block",)
    return (method,) if method else ()


def _group_form(group: object) -> str | None:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        return None
    inputs = group.get("input_activations")
    inputs_bits = inputs.get("num_bits") if isinstance(inputs, dict) else None
    return f"compressed-tensors {weights.get('type', 'int')} w{weights.get('num_bits')}a{inputs_bits or 16}"
