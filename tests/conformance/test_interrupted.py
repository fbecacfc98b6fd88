"""Interrupted and resumed runs: the model is clean after an interruption, and a resumed run continues its edit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS, adamw
from conformance.interrupted_runs import assert_clean, assert_same_bits, callbacks, loop, train, weights
from transformers import TrainerCallback

from kedit_train import world
from kedit_train.callbacks import NormBall, ParameterScope, editing
from kedit_train.core.state_file import FILE, load_state
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.owners import claim, release


class Stop(TrainerCallback):
    """Raise an error at the end of a step, as if the user pressed ^C."""

    def __init__(self, error: type[BaseException], at: int = 3) -> None:
        self.error, self.at = error, at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise self.error("stopped")


@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_a_kill_between_the_checkpoint_and_the_state_of_the_edit_loses_nothing(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.load()[0]
    train(whole, tmp_path / "whole", callbacks())
    with monkeypatch.context() as patch:
        # The process ends after the trainer has written its checkpoint.
        patch.setattr(ParameterScope, "on_save", lambda *args, **kwargs: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            train(world.load()[0], tmp_path / "killed", callbacks(), save_total_limit=limit)
    assert not (tmp_path / "killed" / "checkpoint-2" / FILE).exists()
    resumed = world.load()[0]
    train(resumed, tmp_path / "killed", callbacks(), resume=True)
    assert_same_bits(weights(whole), weights(resumed))
    assert list((tmp_path / "killed").glob(f"*{FILE}")) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(ValueError, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_model_is_clean_after_an_exception_and_is_not_edited_again(
    error: type[BaseException], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = world.load()[0].to(dtype)
    with pytest.raises(error, match="stopped"):
        train(model, tmp_path, [*callbacks(), Stop(error)])
    assert_clean(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with pytest.raises(EditError, match=r"contains 3 steps of an edit that was interrupted.*load the model again") as e:
        train(model, tmp_path / "again", callbacks())
    assert "\n" not in str(e.value)
    model.load_state_dict(world.load()[0].to(dtype).state_dict())
    train(model, tmp_path / "third", callbacks(), steps=2)


def test_a_run_that_ends_without_another_checkpoint_keeps_the_state_that_a_kill_left_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.load()[0]
    with monkeypatch.context() as patch:
        # The process ends after the trainer has written its last checkpoint, and while the state is written into it.
        patch.setattr(ParameterScope, "on_save", lambda *args, **kwargs: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            train(whole, tmp_path, callbacks(), steps=2)
    left = killed_process_folder(tmp_path / "checkpoint-2", f".{FILE}")
    near = killed_process_folder(tmp_path, f".checkpoint-2-{FILE}")
    for _ in range(2):
        resumed = world.load()[0]
        train(resumed, tmp_path, callbacks(), steps=2, resume=True)
        assert_same_bits(weights(whole), weights(resumed))
        assert (tmp_path / "checkpoint-2" / FILE).exists()
        assert list(tmp_path.glob(f"*{FILE}")) == []
        assert not left.exists()
        assert not near.exists()


def killed_process_folder(parent: Path, name: str) -> Path:
    """Make a hidden folder like that of a process that was killed while it wrote a file."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder = claim(parent, name, ".unfinished")
    release(folder)
    folder = folder.with_name(folder.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    folder.mkdir()
    (folder / FILE).write_bytes(b"half")
    return folder


@pytest.mark.parametrize("part", ["optimizer.pt", pytest.param("scheduler.pt", marks=pytest.mark.slow)])
def test_a_half_deleted_checkpoint_is_an_error(part: str, tmp_path: Path) -> None:
    train(world.load()[0], tmp_path, callbacks(), steps=2)
    (tmp_path / "checkpoint-2" / part).unlink()
    with pytest.raises(EditError, match=rf"checkpoint-2 is incomplete: {part.split('.')[0]}\.\* is missing") as error:
        train(world.load()[0], tmp_path, callbacks(), steps=4, resume=True)
    assert "\n" not in str(error.value)
    # With save_only_model, checkpoints have no optimizer, and the trainer starts with a new one.
    with pytest.warns(UserWarning, match=rf"checkpoint-2 has no {part.split('.')[0]} state .*, so the final weights"):
        train(world.load()[0], tmp_path, callbacks(), steps=4, resume=True, save_only_model=True)


def test_resuming_reads_the_state_of_the_edit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(world.load()[0], tmp_path, callbacks(), steps=2)
    read: list[Any] = []

    def counted(folder: Any, **options: Any) -> Any:
        found = load_state(folder, **options)
        read.extend([] if found is None else [folder])
        return found

    monkeypatch.setattr("kedit_train.callbacks.hosts.transformers_host.load_state", counted)
    train(world.load()[0], tmp_path, callbacks(), steps=4, resume=True)
    assert len(read) == 1


def test_an_interrupted_run_resumes_in_the_same_model(tmp_path: Path) -> None:
    whole, model = world.load()[0], world.load()[0]
    train(whole, tmp_path / "whole", callbacks())
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "parts", [*callbacks(), Stop(KeyboardInterrupt)])
    train(model, tmp_path / "parts", callbacks(), resume=True)
    assert_same_bits(weights(whole), weights(model))


@pytest.mark.parametrize("host", ["Trainer", pytest.param("SFTTrainer", marks=pytest.mark.slow)])
def test_resuming_with_another_scope_is_an_error_before_the_optimizer_is_loaded(host: str, tmp_path: Path) -> None:
    train(world.load()[0], tmp_path, callbacks(), host, steps=2)
    with pytest.raises(EditError, match=r"with another scope: .*: 2 in the checkpoint, 1 in this run\)"):
        train(world.load()[0], tmp_path, callbacks("3"), host, steps=4, resume=True)


def test_a_lightning_checkpoint_saved_after_fit_can_be_resumed(tmp_path: Path) -> None:
    def fit(steps: int, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = world.load()
        torch.manual_seed(0)
        edits = EditDataset(world.edits(n=8))
        return model, HOSTS["Lightning"](model, tokenizer, edits, callbacks(), steps, batch_size=8, **options)

    whole, _ = fit(4)
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(4, ckpt_path=str(tmp_path / "two.ckpt"))
    assert_same_bits(weights(whole), weights(resumed))


def test_averaging_the_weights_is_refused_in_lightning() -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    model, tokenizer = world.load()
    with pytest.raises(EditError, match="StochasticWeightAveraging replaces the weights by averages"):
        HOSTS["Lightning"](
            model, tokenizer, EditDataset(world.edits(n=8)), [*callbacks(), StochasticWeightAveraging(1e-3)], 2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_loop_resumes_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, part, resumed = (world.load()[0].to(dtype) for _ in range(3))
    loop(whole, range(6))
    torch.save(loop(part, range(3)), tmp_path / "three.pt")
    loop(resumed, range(3, 6), torch.load(tmp_path / "three.pt", weights_only=True))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_plain_loop_does_not_resume_with_other_weights(tmp_path: Path) -> None:
    state = loop(world.load()[0], range(2))
    model, tokenizer = world.load()
    with editing(model, callbacks(), tokenizer=tokenizer) as edit:
        with pytest.raises(EditError, match=r"must have the weights of the checkpoint.*model\.load_state_dict\(\)"):
            edit.load_state_dict(state["edit"])
        with pytest.raises(EditError, match=r"begins with the first edit\.before_step"):
            edit.state_dict()


def fail_after_one_step(model: Any) -> None:
    with editing(model, [ParameterScope(layers=3, modules="mlp")]) as edit:
        optimizer = adamw(edit.parameters())
        edit.before_step()
        model(input_ids=torch.arange(8).unsqueeze(0), labels=torch.arange(8).unsqueeze(0)).loss.backward()
        optimizer.step()
        raise ZeroDivisionError


def test_a_loop_that_failed_is_not_edited_again() -> None:
    model = world.load()[0]
    with pytest.raises(ZeroDivisionError):
        fail_after_one_step(model)
    assert_clean(model)
    with pytest.raises(EditError, match="contains 1 steps of an edit that was interrupted"):
        fail_after_one_step(model)


def test_one_failing_detach_leaves_nothing_attached() -> None:
    class Fails(NormBall):
        order = 1

        def detach(self, run: Any) -> None:
            raise KeyError("on purpose")

    model = world.load()[0]
    with pytest.raises(KeyError, match="on purpose"), editing(model, [Fails(1e-3), *callbacks()[:3]]):
        pass
    assert_clean(model)
