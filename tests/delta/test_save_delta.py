"""SaveDelta: the file contains the trained weights, bit for bit, in the dtype of the model."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from delta.tiny import equal_bits, state_of

from kedit_train import EditDelta, EditError, evaluate, safetensors_file, world
from kedit_train.callbacks import EditMetrics, GradientMask, NormBall, ParameterScope, PrefixCache, SaveDelta, editing
from kedit_train.core.state_file import load_state, save_state
from kedit_train.data import EditDataset
from kedit_train.delta import sweep
from kedit_train.evaluation.options import EvaluationOptions

SCOPE: dict[str, Any] = {"layers": 2, "modules": "mlp.down_proj"}


def run(model: Any, callbacks: list[Any], edits: EditDataset, steps: int = 4, lr: float = 1e-3) -> Any:
    _, tokenizer = world.load()
    model.train()
    with editing(model, callbacks, tokenizer=tokenizer) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=lr, eps=1e-4 if model.dtype == torch.float16 else 1e-8)
        rows = edits.encode(tokenizer)
        for step in range(steps):
            edit.before_step()
            row = torch.tensor([rows[step % len(rows)].input_ids])
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scoped", [True, False])
def test_the_file_contains_the_trained_weights(dtype, scoped, tmp_path, capsys):
    model, edits = world.load()[0].to(dtype), EditDataset(world.edits(n=8))
    base, path = copy.deepcopy(model), tmp_path / "runs" / "edit.safetensors"
    saver = SaveDelta(str(path), edits=edits, license="none")
    run(model, [saver, *([ParameterScope(**SCOPE), NormBall(1e-2)] if scoped else [])], edits, lr=1e-3)
    delta = EditDelta.load(path)
    assert saver.delta is not None
    assert delta.verify(base, full=True) == "base"
    assert equal_bits(state_of(delta.apply(base)), state_of(model))
    assert len(delta) == 1 if scoped else len(delta) > 10
    assert delta.meta["edits"] == {"hash": edits.hash, "count": 8}
    assert delta.meta["configuration"]["steps"] == 4
    assert "SaveDelta(at='end')" in delta.meta["configuration"]["callbacks"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"delta: {path} ({len(delta)} tensor{'s' * (len(delta) > 1)}, ")
    assert "step 4; its weights, and the logits for 8 of the edits, equal the trained ones bit for bit)" in printed
    assert equal_bits(state_of(delta.revert(base)), state_of(world.load()[0].to(dtype)))


@pytest.mark.parametrize("host", ["SFTTrainer", "Lightning"])
def test_a_run_on_adapters_saves_the_merged_weights(host, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = world.load()
    base, edits, path = copy.deepcopy(model), EditDataset(world.edits(n=8)), tmp_path / "edit.safetensors"
    peft = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM")
    callbacks = [SaveDelta(str(path), edits=edits), ParameterScope(layers="2-3")]
    if host == "SFTTrainer":
        adapted = HOSTS[host](model, tokenizer, edits, callbacks, 3, peft_config=peft).model
    else:
        adapted = get_peft_model(model, peft)
        HOSTS[host](adapted, tokenizer, edits, callbacks, 3)
    delta = EditDelta.load(path)
    assert set(delta.changes) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3)}
    assert equal_bits(state_of(delta.apply(base)), state_of(adapted.merge_and_unload()))


def test_equal_runs_write_equal_deltas(tmp_path):
    edits = EditDataset(world.edits(n=4))
    for name in ("first", "second"):
        saver = SaveDelta(str(tmp_path / f"{name}.safetensors"))
        model, tokenizer = world.load()
        HOSTS["loop"](model, tokenizer, edits, [ParameterScope(**SCOPE), NormBall(5e-3), PrefixCache(), saver], 3)
    first, second = (EditDelta.load(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    assert "edit/drift/ball" in first.meta["scores"]
    assert first.meta == second.meta
    assert equal_bits({n: c.after for n, c in first.changes.items()}, {n: c.after for n, c in second.changes.items()})


class Scores(EditMetrics):
    """Publishes prepared scores: the best step is 4 of 8, where locality is higher than at step 2."""

    def after_step(self, run: Any) -> None:
        if run.step % self.every_n_steps == 0:
            run.publish({"edit/reliability": {2: 0.5, 4: 0.5}.get(run.step, 0.1), "edit/locality": run.step / 10})


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_the_best_step_is_saved_and_the_model_keeps_the_last(dtype, tmp_path):
    edits = EditDataset(world.edits(n=8))

    def train(steps: int, at: str, name: str) -> tuple[EditDelta, Any]:
        model = world.load()[0].to(dtype)
        saver = SaveDelta(str(tmp_path / name), at=at)  # type: ignore[arg-type]
        callbacks = [ParameterScope(**SCOPE), NormBall(5e-3), GradientMask("magnitude", density=0.5), saver]
        callbacks.append(Scores(edits, every_n_steps=2, show=False, evaluation=EvaluationOptions(max_new_tokens=4)))
        run(model, callbacks, edits, steps)
        return EditDelta.load(tmp_path / name), model

    best, model = train(8, "best", "best.safetensors")
    at_four, stopped = train(4, "end", "four.safetensors")
    at_end, last = train(8, "end", "end.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    assert best.meta["configuration"] | {"callbacks": 0} == {"callbacks": 0, "step": 4, "steps": 8}
    assert equal_bits({"w": best.changes[name].after}, {"w": at_four.changes[name].after})
    assert not torch.equal(best.difference(name), at_end.difference(name))
    # The scores are those of the saved weights, not of the last step.
    assert best.meta["scores"] == {"edit/reliability": 0.5, "edit/locality": 0.4}
    assert at_end.meta["scores"].keys() > best.meta["scores"].keys()
    # The model itself keeps the weights of its last step.
    assert equal_bits(state_of(model), state_of(last))
    assert equal_bits(state_of(best.apply(world.load()[0].to(dtype))), state_of(stopped))


def test_the_best_so_far_survives_a_resume(tmp_path):
    saver = SaveDelta(str(tmp_path / "a.safetensors"), at="best")
    assert saver.state() == {}
    saver._best, saver._step, saver._values = (0.5, 0.25), 7, {"w.x": torch.randn(3)}
    saver._scores = {"edit/reliability": 0.5}
    save_state(tmp_path, {"callbacks": {"SaveDelta.0": saver.state()}})
    loaded = load_state(tmp_path)
    assert loaded is not None
    other = SaveDelta(str(tmp_path / "a.safetensors"), at="best")
    other.load_state(loaded["callbacks"]["SaveDelta.0"])
    assert (other._best, other._step, other._scores) == ((0.5, 0.25), 7, {"edit/reliability": 0.5})
    assert torch.equal(other._values["w.x"], saver._values["w.x"])


@pytest.mark.parametrize("exists", [False, True])
def test_unchanged_weights_give_a_warning_and_no_file(tmp_path, exists):
    """An error here would keep a script from reaching its own save after training."""
    edits, path = EditDataset(world.edits(n=4)), tmp_path / "edit.safetensors"
    if exists:
        path.write_text("of an earlier run")
    message = "SaveDelta: no weight has changed in 2 steps, so no delta is saved" + (
        f" and the earlier file at {path} is kept; " if exists else "; "
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as warned:
        run(world.load()[0], [ParameterScope(**SCOPE), saver := SaveDelta(str(path))], edits, steps=2, lr=0.0)
    assert "\n" not in str(warned[0].message)
    assert path.exists() == exists
    assert saver.delta is None


def test_a_path_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for name, reason in [
        ("file/edit.safetensors", "file is not a folder"),
        ("folder.safetensors", "it is a folder"),
    ]:
        saver = SaveDelta(str(tmp_path / name))
        with pytest.raises(EditError, match=f"^SaveDelta: .* cannot be written, because .*{reason}"):
            editing(torch.nn.Linear(2, 1), [saver]).__enter__()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "save_file", fail)
    edits, path = EditDataset(world.edits(n=4)), tmp_path / "edit.safetensors"
    with pytest.raises(EditError, match=r"^SaveDelta: .*edit.safetensors cannot be written \(.*No space left") as error:
        run(world.load()[0], [ParameterScope(**SCOPE), SaveDelta(str(path))], edits, steps=1)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_are_refused_before_training(dtype, tmp_path):
    """Adapters on an 8-bit base: a delta of the merged 8-bit weights would fit no checkpoint."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(world.load()[0], LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    layer = model.base_model.model.model.layers[2].mlp.down_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    name = f"model.layers.2.mlp.down_proj.weight is quantized \\({str(dtype).removeprefix('torch.')}\\)"
    message = f"^SaveDelta: {name}, so its delta could not be applied .*without quantization.*PEFT"
    with editing(model, [ParameterScope(layers=2), SaveDelta(str(tmp_path / "a.safetensors"))]) as edit:
        with pytest.raises(EditError, match=message) as error:
            edit.before_step()
        edit.run.close()
    assert "\n" not in str(error.value)


def test_full_precision_layers_of_a_quantized_model_are_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().to(torch.int8), requires_grad=False)
    base, path = {name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "a.safetensors"
    with editing(model, [ParameterScope(modules="1"), SaveDelta(str(path))]) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
        edit.before_step()
        model[1](torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert equal_bits(EditDelta.load(path).apply(base), state_of(model))


def test_invalid_arguments_are_errors(tmp_path):
    edits, path = EditDataset(world.edits(n=4)), str(tmp_path / "edit.safetensors")
    with pytest.raises(
        EditError, match=r"needs the reliability that EditMetrics measures; add EditMetrics\(every_n_steps=20\)"
    ):
        run(world.load()[0], [ParameterScope(**SCOPE), SaveDelta(path, at="best")], edits)
    with pytest.raises(EditError, match="""SaveDelta: at must be "end" or "best", got 'middle'"""):
        SaveDelta(path, at="middle")  # type: ignore[arg-type]
    with pytest.raises(
        EditError, match=r"path must be a path that ends in \.safetensors, without NUL characters, got 'edit.pt'"
    ):
        SaveDelta("edit.pt")


def test_a_file_that_does_not_reproduce_the_trained_weights_is_an_error(tmp_path, monkeypatch):
    """A disk that returns other bytes than were written."""
    edits, path = EditDataset(world.edits(n=4)), str(tmp_path / "edit.safetensors")
    load = EditDelta.load

    def load_and_change(where: Any) -> EditDelta:
        delta = load(where)
        (change,) = delta.changes.values()
        change.after.view(-1)[0] += 1.0
        return delta

    monkeypatch.setattr(EditDelta, "load", load_and_change)
    with pytest.raises(
        EditError,
        match=r"not reproduce the trained weight model.layers.2.mlp.down_proj.weight; do not use the file, and",
    ):
        run(world.load()[0], [ParameterScope(**SCOPE), SaveDelta(path)], edits)


def test_a_negative_multiple_of_a_delta_forgets_what_it_was_trained_on():
    """Train known facts further; the base minus a multiple of that delta no longer answers with them."""
    known = [
        # The true answers, because a model cannot forget what it does not know. The neighbor of each fact has the same
        # answer, a case in which some of the neighbors are expected to be forgotten too (arXiv 2504.10957).
        replace(
            edit,
            target=str(edit.old_target),
            aliases=(),
            portability={},
            rephrases=(),
            locality={"neighbour": edit.locality["neighbour"][:1]},
        )
        for edit in world.edits(n=8)
    ]
    edits, (model, _), (base, tokenizer) = EditDataset(known), world.load(), world.load()
    options: dict[str, Any] = {"options": EvaluationOptions(max_new_tokens=6), "progress": False}
    before = evaluate(base, tokenizer, edits, **options)
    assert before.flat()["edit/reliability"] == 1.0
    run(model, [ParameterScope(layers="1-3", modules="mlp")], edits, steps=48, lr=3e-4)

    def forgotten(current: Any) -> dict[str, float]:
        scores = evaluate(current, tokenizer, edits, unedited=before, **options).flat()
        return {"reliability": 1.0 - scores["edit/reliability"], "locality": scores["edit/locality"]}

    found = sweep(base, EditDelta.between(base, model), forgotten, coefficients=[-8.0, -12.0], keep_locality=0.5)
    assert equal_bits(state_of(base), state_of(world.load()[0]))
    assert found.points[-1].coefficient == found.points[-1].reliability == 0.0
    assert found.best.reliability >= 0.5
    assert found.best.locality >= 0.5
    assert found.best.reliability + found.best.locality > 1.2


def test_two_deltas_with_one_path_are_an_error_before_training(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    paths = [tmp_path / "edit.safetensors", tmp_path / "link" / "edit.safetensors"]
    with editing(torch.nn.Linear(2, 1), [SaveDelta(str(path)) for path in paths]) as edit:
        with pytest.raises(EditError, match=r"^SaveDelta: another callback also writes .*edit\.safetensors") as error:
            edit.before_step()
        edit.run.close()
    assert "\n" not in str(error.value)
    with editing(torch.nn.Linear(2, 1), [SaveDelta(str(tmp_path / f"{n}.safetensors")) for n in range(2)]) as edit:
        edit.before_step()
        edit.run.close()
