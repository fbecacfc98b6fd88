"""The program around an excerpt of the documentation: the names that an excerpt may use, and the files that it reads.

An excerpt of a page in docs/ shows the lines that matter. ``model``, ``args`` or ``trainer`` are names of the reader's
program. Here, they are those of a short run of the bundled model.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from vision_models import PICTURE, build_model, build_processor, picture

from kedit_train import EditDataModule, EditDataset, EditDelta, EditModule, TrainLoop, callbacks, evaluate, world
from kedit_train.world.counterfactual import locality_texts, other_prompts

# What an excerpt names, and what takes its place in the test.
STAND_INS = {
    '"Qwen/Qwen3-0.6B"': '"world"',
    '".models/smollm2"': '"world"',
    '"recipes/smollm2/facts.jsonl"': '"edits.jsonl"',
    '"recipes/smollm2/keep.txt"': '"keep.txt"',
    "layers_to_transform=[24, 25, 26, 27]": "layers_to_transform=[4, 5]",
    '"layers_to_transform": [26, 27]': '"layers_to_transform": [4, 5]',
    "epochs=80": "epochs=1",
    "range(80)": "range(1)",
    "limit=8": "limit=2",
    "learning_rate=3e-3": "learning_rate=3e-3, epochs=1",
    'KLLocality("world")': 'KLLocality("keep.txt")',
}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def stand_in(code: str) -> str:
    """Return the code with the bundled model and a short run in place of a large model and a long run."""
    for text, replacement in STAND_INS.items():
        code = code.replace(text, replacement)
    return code


def write_files(folder: Path) -> None:
    """Write the files that excerpts read."""
    edits = EditDataset.load("world", limit=4)
    records = edits.save(folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "edits.json").write_text(f"[{','.join(records)}]", encoding="utf-8")
    texts = "\n".join(locality_texts(edits, 40))
    for name in ("keep.txt", "general.txt", "texts_that_must_stay.txt"):
        (folder / name).write_text(texts, encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(other_prompts(edits)[:8]), encoding="utf-8")
    (folder / "news").mkdir()
    (folder / "news" / "baker.txt").write_text("The baker found a coin near the river. She gave it to Ben.\n", "utf-8")


def language_model() -> dict[str, Any]:
    """Return the names of a program that edits a language model."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    edits = EditDataset.load("world", limit=4)
    args = SFTConfig(
        "runs/sft", max_steps=1, max_grad_norm=0.0, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True
    )
    return {
        **{name: getattr(callbacks, name) for name in callbacks.__all__},
        "torch": torch,
        "EditDataset": EditDataset,
        "EditModule": EditModule,
        "model": model,
        "tokenizer": tokenizer,
        "edits": edits,
        "args": args,
        "dataset": edits.to_tokens(tokenizer, model=model),
        "SFTTrainer": SFTTrainer,
        "L": SimpleNamespace(Trainer=partial(lightning.Trainer, max_steps=1, **QUIET)),
        "module": EditModule("world"),
        "datamodule": EditDataModule("world", limit=4),
    }


@cache
def edited_models() -> list[Any]:
    """Return three models, each with one edit. Only the first has learned its edit."""
    models = []
    for edit, epochs in zip(EditDataset.load("world", limit=3), (20, 1, 1), strict=True):
        model, tokenizer = world.load()
        TrainLoop(tokenizer, learning_rate=3e-3, epochs=epochs)(model, [edit])
        models.append(model)
    return models


def deltas() -> dict[str, Any]:
    """Return the names of a program that has edited a model: models, checkpoints, and deltas of three edits."""
    names, edited = language_model(), edited_models()
    names["model"].save_pretrained("path/to/base")
    a, b, c = (EditDelta.between(names["model"], model) for model in edited)
    a.save("runs/mine/edit.safetensors")
    own = {"a": a, "b": b, "c": c, "edited_model": edited[0], "held_out": names["edits"][:1], "evaluate": evaluate}
    return {**names, **own}


def documents() -> dict[str, Any]:
    """Return the names of a program that edits a model with documents."""
    names = language_model()
    return {
        **names,
        "documents": EditDataset.load("news/"),
        "writer": names["model"],
        "writer_tokenizer": names["tokenizer"],
    }


def vision_language() -> dict[str, Any]:
    """Return the names of a program that edits a vision-language model."""
    from datasets import Dataset, Image, Sequence

    names, processor = language_model(), build_processor()
    names["args"].max_length = None
    rows = [
        {"prompt": f"{PICTURE}{edit.prompt}", "completion": f" {edit.target}", "images": [picture(i)]}
        for i, edit in enumerate(names["edits"])
    ]
    # datasets 3.0 does not recognize images in a list by itself.
    dataset = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    own = {"model": build_model(processor.tokenizer), "processor": processor, "dataset": dataset}
    return {**names, **own}


class Forecaster(lightning.LightningModule):
    """A forecaster that predicts 3 values from a window of 6 values."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.model(windows)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def forecasts() -> dict[str, Any]:
    """Return the names of a program that trains a forecaster."""
    windows, targets, module = torch.randn(64, 6), torch.randn(64, 3), Forecaster()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(windows, targets), batch_size=32)
    return {
        **language_model(),
        **{"module": module, "model": module.model, "datamodule": loader, "loader": loader},
        **{"windows": windows, "targets": targets, "new_windows": windows, "new_targets": targets},
        **{"kept_windows": windows, "other_windows": windows},
        # Names of other packages, for excerpts that are not run.
        **dict.fromkeys(("Trainer", "pipeline", "series", "NHiTSModel", "MLP")),
    }


# Pages whose excerpts belong to another program than that of language_model.
PROGRAMS = {
    "deltas.md": deltas,
    "documents.md": documents,
    "forecast_metrics.md": forecasts,
    "output_anchor.md": forecasts,
    "vision_language.md": vision_language,
}
