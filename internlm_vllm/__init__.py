"""A plugin of vLLM (entry point `vllm.general_plugins`): both families through vLLM's Transformers backend.

vLLM's own InternLM2 leaves out biases and computes another dynamic NTK scaling; InternLM it has no more.
"""

MODELS = {"InternLMForCausalLM": "InternLMForVllm", "InternLM2ForCausalLM": "InternLM2ForVllm"}
"""What config.json calls a model, and the class in models.py that serves it."""


def register() -> None:
    """Tell vLLM where the classes are; called by vLLM in each of its processes. Imports nothing else."""
    from vllm import ModelRegistry

    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, f"{__name__}.models:{name}")
