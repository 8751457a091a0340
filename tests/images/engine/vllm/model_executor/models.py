"""The architectures it loads."""


class ModelRegistry:
    """One."""

    @staticmethod
    def get_supported_archs():
        """Of the models that the tests put into images."""
        return ["LlamaForCausalLM", "Qwen3ForCausalLM"]
