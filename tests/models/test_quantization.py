"""Forms of quantised weights: their names, and that the engine's probe has examples by the same names."""

from __future__ import annotations

import pytest

from pilotlight.engines.probe import QUANTIZED
from pilotlight.models.quantization import forms_of


@pytest.mark.parametrize("form", QUANTIZED)
def test_each_example_of_the_probe_has_the_name_that_it_stands_under(form):
    assert forms_of(QUANTIZED[form]) == (form,)


@pytest.mark.parametrize(
    ("config", "forms"),
    [
        ({}, ()),
        ({"quant_method": None}, ()),
        ({"quant_method": "AWQ", "w_bit": 4}, ("awq 4-bit",)),
        ({"quant_method": "gptq_marlin", "bits": 8, "sym": True, "desc_act": False}, ("gptq 8-bit",)),
        # Without groups the order of activations means nothing.
        ({"quant_method": "gptq", "bits": 4, "desc_act": True, "group_size": -1}, ("gptq 4-bit",)),
        ({"quant_method": "auto-round"}, ("inc",)),
        ({"quant_method": "hqq"}, ("hqq",)),
        ({"quant_method": "compressed-tensors"}, ("compressed-tensors",)),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": 3}}, ("compressed-tensors",)),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": {"type": "int", "num_bits": 4}, "input_activations": None},
                    "b": {"weights": {"type": "float", "num_bits": 8}, "input_activations": {"num_bits": 8}},
                    "c": {"weights": {"type": "int", "num_bits": 4}, "input_activations": None},
                },
            },
            ("compressed-tensors int w4a16", "compressed-tensors float w8a8"),
        ),
    ],
)
def test_names_of_forms(config, forms):
    assert forms_of(config) == forms
