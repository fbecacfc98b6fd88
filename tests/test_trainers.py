"""EditSFTTrainer from a configuration against SFTTrainer with the same callbacks, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conformance.settings import public_callbacks
from trl import SFTConfig, SFTTrainer, TrlParser

from kedit_train import EditDataset, EditError, EditSFTConfig, EditSFTTrainer, world
from kedit_train.callbacks import EditMetrics, KLLocality, NormBall, ParameterScope, StopWhenEdited, TokenSmoothing
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.trainers import CALLBACKS

RUN = """
edits: world.jsonl
max_steps: 4
learning_rate: 5.0e-3
per_device_train_batch_size: 4
parameter_scope: {layers: 0.5, modules: mlp.down_proj}
token_smoothing: {label_weight: 0.2}
kl_locality: {texts: ["The old baker found a coin.", "A red fox slept."], batch_size: 2}
norm_ball: {fraction: 0.5}
edit_metrics: {every_n_steps: 2, evaluation: {max_new_tokens: 8}, show: false}
stop_when_edited: true
"""
# Arguments for a test on a machine without a GPU.
HERE = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    EditDataset(world.edits(n=6)).save("world.jsonl")
    return tmp_path


def flags(folder: Path) -> list[str]:
    here = [f"--{name}={value}" for name, value in HERE.items() if name != "report_to"]
    return ["--config", "run.yaml", f"--output_dir={folder / 'out'}", "--report_to=none", *here]


def parsed(folder: Path, *more: str) -> EditSFTConfig:
    (folder / "run.yaml").write_text(RUN)
    (found,) = TrlParser(EditSFTConfig).parse_args_and_config([*flags(folder), *more])
    return found


def test_a_yaml_file_and_a_list_of_callbacks_give_equal_weights_bit_for_bit(folder: Path) -> None:
    assert len(RUN.strip().splitlines()) == 10
    model, tokenizer = world.load()
    trainer = EditSFTTrainer(model, args=parsed(folder), processing_class=tokenizer)
    trainer.train()
    plain, _ = world.load()
    edits = EditDataset.load("world.jsonl")
    untouched = {name: p.detach().clone() for name, p in plain.named_parameters()}
    arguments: dict[str, Any] = {"max_steps": 4, "learning_rate": 5e-3, "per_device_train_batch_size": 4, **HERE}
    SFTTrainer(
        plain,
        SFTConfig(output_dir=str(folder / "plain"), **arguments),
        train_dataset=edits.to_prompt_completion(),
        processing_class=tokenizer,
        callbacks=[
            ParameterScope(layers=0.5, modules="mlp.down_proj"),
            TokenSmoothing(label_weight=0.2),
            KLLocality(texts=["The old baker found a coin.", "A red fox slept."], batch_size=2),
            NormBall(fraction=0.5),
            EditMetrics(edits, every_n_steps=2, evaluation=EvaluationOptions(max_new_tokens=8), show=False),
            StopWhenEdited(loss=None, reliability=1.0),
        ],
    ).train()
    now = dict(model.named_parameters())
    moved = []
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.view(torch.int32), now[name].view(torch.int32)), name
        if not torch.equal(parameter, untouched[name]):
            moved.append(name)
    assert moved == ["model.layers.3.mlp.down_proj.weight"]


def test_a_saved_model_has_a_card_about_the_edit(folder: Path) -> None:
    model, tokenizer = world.load()
    delta = folder / "edit.safetensors"
    args = parsed(folder, "--save_delta", f'{{"path": "{delta}"}}', "--save_strategy=steps", "--save_steps=2")
    trainer = EditSFTTrainer(model, args=args, processing_class=tokenizer)
    trainer.train()
    # A checkpoint during training has TRL's card only: no report has been made yet.
    assert "## Knowledge edit" not in (folder / "out" / "README.md").read_text()
    trainer.save_model(str(folder / "saved"))
    trainer.save_model()
    metrics = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EditMetrics))
    assert metrics.report is not None
    for place in ("saved", "out"):
        card = (folder / place / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert {"trl", "sft", "knowledge-editing", "kedit-train"} <= set(front["tags"])
        assert card.count("## Knowledge edit") == 1
        assert metrics.report.meta["data_hash"] in card
        for name in ("ParameterScope", "TokenSmoothing", "KLLocality", "NormBall"):
            assert f"callback: {name}(" in card
        assert f"{len(metrics.report.answers)} probes" in card
        assert "- optimizer steps: 4" in card
        assert "- training: " in card
        assert "1 tensors" in card or "1 tensor" in card
        for paper in ("2509.22072", "2502.00602", "2110.11309", "2012.00363"):
            assert f"https://arxiv.org/abs/{paper}" in card
    assert (folder / "saved" / "model.safetensors").is_file()


def test_a_chat_is_trained_and_evaluated_with_the_chat_template(folder: Path) -> None:
    model, tokenizer = world.load()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} Answer:"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    args = EditSFTConfig(
        str(folder / "chat"), **HERE, num_train_epochs=1, prompt_format="chat", edit_metrics={"show": False}
    )
    edits = world.edits(n=3)
    trainer = EditSFTTrainer(model, args=args, edits=edits, processing_class=tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert texts == [f"{e.prompt} Answer: {e.target}{tokenizer.eos_token}" for e in edits]
    trainer.train()
    metrics = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EditMetrics))
    assert metrics.report is not None
    assert metrics.report.meta["settings"]["prompt_format"] == "chat"


@pytest.mark.parametrize("declared", ["plain", "chat"])
def test_the_context_teacher_gets_the_edits_and_the_format_of_the_training_data(declared: str, folder: Path) -> None:
    model, tokenizer = world.load()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    edits = EditDataset(world.edits(n=4))
    args = EditSFTConfig(
        str(folder / "teacher"), **HERE, num_train_epochs=1, logging_steps=1, prompt_format=declared,
        context_teacher={"min_followed": 0.0},
    )  # fmt: skip
    # With the default format, the training data may still be conversations.
    rows = edits.to_prompt_completion(prompt_format="chat") if declared == "plain" else None
    trainer = EditSFTTrainer(model, args=args, edits=edits, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert any(row.get("edit/tokens/taught", 0.0) > 0.0 for row in trainer.state.log_history)


def test_every_callback_has_a_field() -> None:
    assert {kind.__name__ for kind in CALLBACKS.values()} == public_callbacks()
    new = {f.name for f in fields(EditSFTConfig)} - {f.name for f in fields(SFTConfig)}
    assert new == {*CALLBACKS, "edits", "prompt_format", "append_eos"}


def test_a_field_may_be_json_true_or_null_on_the_command_line(folder: Path) -> None:
    args = parsed(folder, "--norm_ball", "null", "--token_smoothing", "true", "--kl_locality", '{"texts": "world"}')
    assert args.norm_ball is None
    assert args.token_smoothing == {}
    assert args.kl_locality == {"texts": "world"}
    # It copies, and it turns into JSON, as SFTConfig does.
    again = EditSFTConfig(output_dir="x", **HERE, **{name: getattr(args, name) for name in CALLBACKS})
    assert [getattr(again, name) for name in CALLBACKS] == [getattr(args, name) for name in CALLBACKS]
    assert '"kl_locality"' in args.to_json_string()


def test_callbacks_that_need_edits_get_those_of_the_trainer() -> None:
    edits = world.edits(n=2)
    args = EditSFTConfig(output_dir="x", **HERE, edit_metrics=True, gradient_mask={"density": 0.1}, norm_ball={})
    made = {type(one).__name__: one for one in args.edit_callbacks(edits)}
    assert list(made) == ["GradientMask", "NormBall", "EditMetrics"]
    assert made["EditMetrics"].edits is edits  # pyright: ignore[reportAttributeAccessIssue]
    args.edit_metrics = {"edits": "other.json"}
    (metrics,) = [one for one in args.edit_callbacks(edits) if isinstance(one, EditMetrics)]
    assert metrics.edits == "other.json"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"kl_locality": {"text": "x"}},
            r"^EditSFTConfig: kl_locality: KLLocality has no argument 'text'; use one of texts",
        ),
        ({"norm_ball": "0.1,"}, r"^EditSFTConfig: norm_ball must be a JSON object such as '{}', got '0.1,'"),
        (
            {"norm_ball": 3},
            r"^EditSFTConfig: norm_ball must be a mapping of arguments of NormBall, or true to use the default argu",
        ),
    ],
)
def test_a_wrong_field_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        EditSFTConfig(output_dir="x", **HERE, **given)


def test_a_trainer_without_an_edit_is_an_error() -> None:
    model, tokenizer = world.load()
    with pytest.raises(EditError, match=r"^EditSFTTrainer: args must be an EditSFTConfig, got SFTConfig"):
        EditSFTTrainer(model, args=SFTConfig(output_dir="x", **HERE), processing_class=tokenizer)  # pyright: ignore
    with pytest.raises(EditError, match="edits or train_dataset must be set, got neither; pass edits="):
        EditSFTTrainer(model, args=EditSFTConfig(output_dir="x", **HERE, norm_ball={}), processing_class=tokenizer)
    with pytest.raises(EditError, match="at least one callback of kedit_train must be set, got none"):
        EditSFTTrainer(model, args=EditSFTConfig(output_dir="x", **HERE, edits="world"), processing_class=tokenizer)


@pytest.mark.slow
def test_trl_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, kedit_train, kedit_train.callbacks;"
        "assert 'trl' not in sys.modules;"
        "kedit_train.EditSFTTrainer;"
        "assert 'trl' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_callbacks_without_an_argument_for_edits_find_those_of_the_trainer(folder: Path) -> None:
    model, tokenizer = world.load()
    options: dict[str, Any] = {**HERE, "max_steps": 1, "null_space": {"texts": "world", "limit": 64, "neighbors": 2}}
    options["parameter_scope"] = {"layers": 0.7, "modules": "mlp.down_proj.weight"}
    args = EditSFTConfig(str(folder / "neighbors"), **options)
    edits = EditDataset(world.edits(4))
    trainer = EditSFTTrainer(model, args=args, edits=edits, processing_class=tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*neighbors=2 .*no prompt could be made")
        trainer.train()
    assert trainer.state.global_step == 1
