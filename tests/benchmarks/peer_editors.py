"""Editors of other projects, loaded from checkouts that the user has, with their settings for SmolLM2.

EasyEdit (github.com/zjunlp/EasyEdit) and LocFT (github.com/ICT-STAR/LocFT) are called as they are. This file has none
of their code. Hyperparameters come from the hparams files of the checkouts, and ``changes`` lists what differs. Where
an editor does not run on a CPU or with a newer library, a function here replaces the name that stands in the way.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kedit_train.data import Edit

# EasyEdit decides by the name of a model what to do, and SmolLM2 is a Llama.
NAME, BLOCKS, LLAMA_BLOCKS = "llama-smollm2", 30, 32
EASYEDIT, LOCFT, KEDIT_TRAIN = "EasyEdit", "LocFT", "kedit-train"


def depth(layer: int) -> int:
    """Return the layer of SmolLM2 at the same relative depth as a layer of a Llama with 32 layers."""
    return round(layer * BLOCKS / LLAMA_BLOCKS)


@dataclass(frozen=True)
class Editor:
    """One editor of the comparison.

    Args:
        label: its name in the table.
        project: EASYEDIT, LOCFT or KEDIT_TRAIN.
        mode: "batch" (all edits in one call) or "sequential" (one edit per call).
        hparams: its file with hyperparameters, in the checkout.
        changes: hyperparameters that differ from this file.
        module, hparams_class, apply: names in EasyEdit.
        prepare: called with the texts and the hyperparameters, before the edits.
        memory: True if the edits are a memory beside the weights, so that no delta can store them.
    """

    label: str
    project: str
    mode: str
    hparams: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    hparams_class: str = ""
    apply: str = ""
    prepare: Callable[[Sequence[str], Any], None] = field(default=lambda texts, hparams: None)
    memory: bool = False


def give_texts(texts: Sequence[str], hparams: Any) -> None:
    """Let EasyEdit compute its second moments on the given texts, in place of all of Wikipedia."""
    stats: Any = importlib.import_module("easyeditor.models.rome.layer_stats")
    stats.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}
    hparams.mom2_n_samples = len(texts)


def give_total_step(texts: Sequence[str], hparams: Any) -> None:
    """Give AdaLoRA the number of steps, which new versions of PEFT ask for."""
    main: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    main.AdaLoraConfig = partial(importlib.import_module("peft").AdaLoraConfig, total_step=hparams.num_steps)


def keep_memory(texts: Sequence[str], hparams: Any) -> None:
    """Let WISE keep the memory of earlier edits, as the editor class of EasyEdit does for edits in sequence."""
    hparams.sequential_edit = True


# Chosen on at most 10 edits of draw 100. The learning rate of FT-M and LocFT: 2e-3 has a larger product of reliability,
# PS and other facts kept than 5e-3. ``v_lr`` of AlphaEdit: with 0.1 as in its file, the values do not reach the targets
# in 25 steps, so it has the value of MEMIT.
_RATE, _V_RATE = {"lr": 2e-3}, {"v_lr": 0.5}
# The files are those for Llama models, with the layers at the same relative depth. The output matrix of SmolLM2 is the
# matrix of its embeddings.
_SUBJECT: dict[str, Any] = {"v_loss_layer": depth(31), "lm_head_module": "model.embed_tokens"}
_MEMIT = {**_SUBJECT, "layers": [depth(layer) for layer in (4, 5, 6, 7, 8)]}
_FT = {"layers": [depth(21)]}
_MEMORY_LAYER = [f"model.layers[{depth(27)}].mlp.down_proj.weight"]
EDITORS = {
    "ft_m": Editor(
        "FT-M", EASYEDIT, "batch", "hparams/FT/llama-7b.yaml",
        {**_FT, **_RATE, "objective_optimization": "target_new"}, "ft", "FTHyperParams", "apply_ft_to_model",
    ),
    "lora": Editor(
        "LoRA", EASYEDIT, "batch", "hparams/LoRA/llama-7b.yaml",
        {}, "lora", "LoRAHyperParams", "apply_lora_to_model", give_total_step,
    ),
    "memit": Editor(
        "MEMIT", EASYEDIT, "batch", "hparams/MEMIT/llama-7b.yaml",
        _MEMIT, "memit", "MEMITHyperParams", "apply_memit_to_model", give_texts,
    ),
    "alphaedit": Editor(
        "AlphaEdit", EASYEDIT, "batch", "hparams/AlphaEdit/llama3-8b.yaml",
        {**_MEMIT, **_V_RATE}, "alphaedit", "AlphaEditHyperParams", "apply_AlphaEdit_to_model", give_texts,
    ),
    "locft": Editor("LocFT-BF", LOCFT, "batch", "hparams/llama3-8b.yaml", {**_RATE, "layer": depth(22)}),
    "ft_m_sequential": Editor(
        "FT-M", EASYEDIT, "sequential", "hparams/FT/llama-7b.yaml",
        {**_FT, "objective_optimization": "target_new"}, "ft", "FTHyperParams", "apply_ft_to_model",
    ),
    "ft_l": Editor(
        "FT-L", EASYEDIT, "sequential", "hparams/FT/llama-7b.yaml",
        _FT, "ft", "FTHyperParams", "apply_ft_to_model",
    ),
    "rome": Editor(
        "ROME", EASYEDIT, "sequential", "hparams/ROME/llama-7b.yaml",
        {**_SUBJECT, "layers": [depth(5)]}, "rome", "ROMEHyperParams", "apply_rome_to_model", give_texts,
    ),
    "grace": Editor(
        "GRACE", EASYEDIT, "sequential", "hparams/GRACE/llama-7b.yaml",
        {"inner_params": _MEMORY_LAYER}, "grace", "GraceHyperParams", "apply_grace_to_model", memory=True,
    ),
    "wise": Editor(
        "WISE", EASYEDIT, "sequential", "hparams/WISE/llama-7b.yaml",
        {"inner_params": _MEMORY_LAYER}, "wise", "WISEHyperParams", "apply_wise_to_model", keep_memory, memory=True,
    ),
    "kedit_default": Editor("`kedit_default`", KEDIT_TRAIN, "batch"),
    "subject_tokens": Editor("`subject_tokens`", KEDIT_TRAIN, "batch"),
    "subject_values": Editor("`subject_values`", KEDIT_TRAIN, "batch"),
    "subject_values_prefixes": Editor("`subject_values` with two prefixes", KEDIT_TRAIN, "batch"),
    "recipe_ft_m": Editor("`ft_m`", KEDIT_TRAIN, "batch"),
    "gated": Editor("`GatedAdapter`", KEDIT_TRAIN, "batch", memory=True),
    "one_by_one": Editor("`one_by_one.py`", KEDIT_TRAIN, "sequential"),
    "one_by_one_subject": Editor("`one_by_one.py --subject_tokens`", KEDIT_TRAIN, "sequential"),
    "one_by_one_values": Editor("`one_by_one.py --keep subject_values`", KEDIT_TRAIN, "sequential"),
}  # fmt: skip


def project_of(checkout: Path) -> str | None:
    """Return which project a folder holds, or None."""
    if (checkout / "easyeditor" / "models").is_dir():
        return EASYEDIT
    return LOCFT if (checkout / "fine-tune.py").is_file() else None


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout and its date, or "unknown" if the folder is no git checkout."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def as_requests(edits: Sequence[Edit], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the edits in the form of EasyEdit.

    ``loc_prompt`` is a text on which WISE must not use its memory. Each edit gets the next short text that does not
    contain its subject.
    """
    short = [text for text in texts if len(text.split()) <= 12]
    requests = []
    for number, edit in enumerate(edits):
        other = next(t for t in short[number:] + short if not (edit.subject and edit.subject in t))
        requests.append(
            {
                "case_id": number, "prompt": edit.prompt, "subject": edit.subject, "target_new": edit.target,
                "ground_truth": edit.old_target, "loc_prompt": other,
            }
        )  # fmt: skip
    return requests


def easyedit_module(checkout: Path, name: str) -> ModuleType:
    """Import one editor of EasyEdit.

    The packages ``easyeditor`` and ``easyeditor.models`` are entered without their ``__init__``, which imports all
    editors and what those for images need.
    """
    for package in ("easyeditor", "easyeditor.models"):
        shell = sys.modules.setdefault(package, ModuleType(package))
        shell.__path__ = [str(checkout / package.replace(".", "/"))]
    return importlib.import_module(f"easyeditor.models.{name}")


def run_easyedit(
    peer: Editor, checkout: Path, model: Any, tokenizer: Any, edits: Sequence[Edit], texts: Sequence[str], given: Any
) -> Any:
    """Make the edits with an editor of EasyEdit, and return the edited model. The given model is changed."""
    module = easyedit_module(checkout, peer.module)
    hparams = getattr(module, peer.hparams_class).from_hparams(str(checkout / peer.hparams))
    batch = len(edits) if peer.mode == "batch" else 1
    for key, value in {"model_name": NAME, "device": "cpu", "batch_size": batch, **peer.changes, **given}.items():
        setattr(hparams, key, value)
    peer.prepare(texts, hparams)
    model.name_or_path = NAME
    tokenizer.pad_token = tokenizer.eos_token
    # The sides that the editor class of EasyEdit sets.
    tokenizer.padding_side = "right" if "fact_token" in vars(hparams) else "left"
    requests = as_requests(edits, texts)
    apply, edited = getattr(module, peer.apply), model
    for part in [requests] if peer.mode == "batch" else [[request] for request in requests]:
        edited, _ = apply(model, tokenizer, part, hparams, copy=False, return_orig_weights=False)
    if peer.module == "lora":
        edited.merge_and_unload()
    if peer.module == "grace":
        _look_up_at_the_last_token(model, edited.layer)
    return model


def _look_up_at_the_last_token(model: Any, layer: str) -> None:
    """Let GRACE look for a key at the last token of every prompt, as its own ``generate`` does for the first prompt."""
    adapter = model.get_submodule(layer.replace("[", ".").replace("]", ""))

    def before(_: Any, args: tuple[Any, ...]) -> None:
        if args[0].shape[1] > 1:
            adapter.key_id = -1

    adapter.register_forward_pre_hook(before)


class _OnCpu:
    """``torch`` for LocFT, which names a GPU for its tensors."""

    def __getattr__(self, name: str) -> Any:
        return (lambda _: torch.device("cpu")) if name == "device" else getattr(torch, name)


def run_locft(
    peer: Editor, checkout: Path, model: Any, tokenizer: Any, edits: Sequence[Edit], texts: Sequence[str], given: Any
) -> Any:
    """Make the edits with LocFT, and return the edited model. The given model is changed."""
    sys.path.insert(0, str(checkout))
    try:
        spec = importlib.util.spec_from_file_location("locft_fine_tune", checkout / "fine-tune.py")
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(checkout))
    module.torch = _OnCpu()
    config = module.FTHyperParams.from_yaml(str(checkout / peer.hparams))
    for key, value in {**peer.changes, **given}.items():
        setattr(config, key, value)
    # LocFT adds a token for padding. A token that no edit contains does the same, and the model keeps its shape.
    tokenizer.pad_token = tokenizer.unk_token
    return module.execute_ft(model, tokenizer, as_requests(edits, texts), config)
