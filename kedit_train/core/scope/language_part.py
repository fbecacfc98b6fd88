"""Find the language model inside a model that also reads images, videos or audio.

In transformers, the configuration of such a model has a part ``text_config``, and ``get_decoder()`` returns its
language model. The vision tower and the projector are outside the language model. Their modules can have the same names
as those of the language model: Qwen2.5-VL has ``mlp.down_proj`` in both.
"""

from __future__ import annotations

from torch import nn

from kedit_train.core.scope.adapters import base_model


def language_path(model: nn.Module) -> str | None:
    """Return the name of the module that is the language model inside a multimodal model.

    Returns:
        For example "model.language_model". The output head is not part of this module. None if the model reads only
        text, or if it predicts no text (CLIP).
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    if getattr(config, "text_config", None) is None or not hasattr(base, "get_decoder"):
        return None
    if base.get_output_embeddings() is None:
        # CLIP and similar models encode texts, but predict none.
        return None
    decoder = base.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and module is not base), None)


def parts_outside_language_model(model: nn.Module) -> dict[str, str]:
    """Return the parameters of a multimodal model that do not belong to its language model.

    The embeddings of the tokens and the output head belong to the language model.

    Returns:
        A dict from the name of a parameter to the name of its part, for example
        {"model.visual.blocks.0.mlp.down_proj.weight": "visual"}. Empty if the model reads only text.
    """
    path = language_path(model)
    if path is None:
        return {}
    base = base_model(model)
    own = [model.get_submodule(path), base.get_input_embeddings(), base.get_output_embeddings()]
    inside = {id(p) for module in own if module is not None for p in module.parameters()}
    around = path.split(".")
    parts = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in inside:
            names = name.split(".")
            # A part is the outermost module around the parameter that does not contain the language model.
            shared = next((i for i, (a, b) in enumerate(zip(names, around, strict=False)) if a != b), len(around))
            parts[name] = names[min(shared, len(names) - 1)]
    return parts
