"""SubjectValues: the weights change only along the dual keys of the subjects, by the stated step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from kedit_train import EditDataset, world
from kedit_train.callbacks import (
    GradientMask,
    NormBall,
    NullSpace,
    ParameterScope,
    PolyakStep,
    SubjectValues,
    TokenLoss,
    editing,
)
from kedit_train.data import Edit
from kedit_train.errors import EditError
from kedit_train.functional.dual_keys import DampedMoment, dual_keys

SCOPE, NAME = "mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"
TEXTS = world.locality_texts(exclude=world.edits(4), n=24)


@pytest.fixture
def model():
    return world.load()[0]


@pytest.fixture(scope="module")
def tokenizer():
    return world.load()[1]


@pytest.fixture(scope="module")
def edits():
    return EditDataset.load("world", limit=4)


def batch_of(tokenizer, edits):
    texts = [f"{edit.prompt} {edit.target}" for edit in edits]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def scope():
    return ParameterScope(2, modules=SCOPE)


def run_steps(model, tokenizer, edits, *callbacks, steps=2, state=None, layers=2):
    """Return the losses, the gradients of the weight, the metrics and the state of a run."""
    losses, gradients, batch = [], [], batch_of(tokenizer, edits)
    given = [ParameterScope(layers, modules=SCOPE), TokenLoss("cross_entropy"), *callbacks]
    with editing(model, given, tokenizer=tokenizer, edits=edits, log_every_n_steps=1) as run:
        optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2, weight_decay=0.1)
        if state is not None:
            run.load_state_dict(state)
        for _ in range(steps):
            run.before_step()
            loss = model(**batch).loss
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(model.get_parameter(NAME).grad.double())
            optimizer.step()
            optimizer.zero_grad()
        saved = run.state_dict()
    return losses, gradients, run.history, saved


def inputs_of(model, tokenizer, text):
    """Return the inputs of the weight on a text, [tokens, d_in]."""
    seen = []
    handle = model.get_submodule(NAME.removesuffix(".weight")).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        model.eval()(input_ids=tokenizer(text, return_tensors="pt").input_ids)
    handle.remove()
    return seen[0][0].double()


def keys_of(model, tokenizer, edits):
    """Return the inputs at the last token of each subject, found by the character offsets of the tokenizer."""
    keys = []
    for edit in edits:
        end = edit.prompt.index(edit.subject) + len(edit.subject)
        offsets = tokenizer(edit.prompt, return_offsets_mapping=True)["offset_mapping"]
        (last,) = [i for i, (begin, stop) in enumerate(offsets) if begin < end <= stop]
        keys.append(inputs_of(model, tokenizer, edit.prompt)[last])
    return torch.stack(keys)


def moment_of(model, tokenizer, texts=TEXTS):
    inputs = torch.cat([inputs_of(model, tokenizer, text) for text in texts])
    return inputs.T @ inputs / len(inputs)


def test_steps_have_the_stated_direction_and_length(model, tokenizer, edits):
    base = world.load()[0]
    before = base.get_parameter(NAME).detach().double()
    keys, moment = keys_of(base, tokenizer, edits), moment_of(base, tokenizer)
    duals, _ = dual_keys(keys, DampedMoment(moment, 0.5))
    # In units in which a dual key changes the outputs on the texts by 1.
    damped = moment + 0.5 * moment.diagonal().median() * torch.eye(len(moment), dtype=moment.dtype)
    duals = duals / torch.einsum("ni,ij,nj->n", duals, damped, duals).sqrt()[:, None]
    losses, gradients, history, _ = run_steps(
        model, tokenizer, edits, SubjectValues(TEXTS, step_size=0.001, damping=0.5), steps=3
    )
    values, squares = torch.zeros(before.shape[0], len(edits), dtype=torch.float64), 0.0
    for step, (loss, gradient) in enumerate(zip(losses, gradients, strict=True), start=1):
        own = gradient @ duals.T
        squares = 0.999 * squares + 0.001 * own.square().mean(0)
        roots = (squares / (1 - 0.999**step)).sqrt()
        direction = own / (roots + 0.3 * roots.mean())
        values = values - 0.001 * loss / (own * direction).sum() * direction
    change, expected = model.get_parameter(NAME).detach().double() - before, values @ duals
    assert float((change - expected).norm() / expected.norm()) < 1e-3
    # The metrics describe the weights after the last step.
    at_subjects = (change @ keys.T).norm() / (before @ keys.T).norm()
    on_texts = (((change @ moment) * change).sum() / ((before @ moment) * before).sum()).sqrt()
    assert history[-1]["edit/drift/subject_change"] == pytest.approx(float(at_subjects), rel=1e-3)
    assert history[-1]["edit/drift/text_change"] == pytest.approx(float(on_texts), rel=1e-3)
    assert on_texts < 0.5 * at_subjects


def test_a_run_is_resumed_bit_for_bit(tokenizer, edits):
    models = [world.load()[0] for _ in range(2)]
    run_steps(models[0], tokenizer, edits, SubjectValues(TEXTS), steps=4)
    saved = run_steps(models[1], tokenizer, edits, SubjectValues(TEXTS), steps=2)[-1]
    run_steps(models[1], tokenizer, edits, SubjectValues(TEXTS), steps=2, state=saved)
    assert torch.equal(models[0].get_parameter(NAME), models[1].get_parameter(NAME))


def test_later_runs_keep_the_outputs_at_the_subjects_of_earlier_runs(model, tokenizer, edits):
    callback = SubjectValues(TEXTS, sequential=True, damping=0.5)
    run_steps(model, tokenizer, edits[:2], callback)
    keys, before = keys_of(model, tokenizer, edits), model.get_parameter(NAME).detach().double()
    # The layers below do not change, so the keys are the same in every run.
    run_steps(model, tokenizer, edits[2:], callback)
    change = (model.get_parameter(NAME).detach().double() - before) @ keys.T
    kept = float(change[:, :2].norm() / change[:, 2:].norm())
    # Without the earlier keys, a run changes them.
    other = world.load()[0]
    run_steps(other, tokenizer, edits[2:], SubjectValues(TEXTS, damping=0.5))
    free = (other.get_parameter(NAME) - world.load()[0].get_parameter(NAME)).detach().double() @ keys.T
    assert kept < 0.25 * float(free[:, :2].norm() / free[:, 2:].norm())


def test_a_prompt_that_is_edited_again_is_no_longer_kept(model, tokenizer, edits):
    callback = SubjectValues(TEXTS, sequential=True)
    run_steps(model, tokenizer, edits[:1], callback)
    losses = run_steps(model, tokenizer, [Edit(edits[0].prompt, "the moon", subject=edits[0].subject)], callback)[0]
    assert losses[1] < losses[0]


def test_later_runs_do_not_use_texts_with_their_evaluation_prompts(model, tokenizer, edits):
    texts = [text for text in TEXTS if edits[1].prompt not in text]
    callback = SubjectValues([*texts, f"{edits[1].prompt} somewhere."], sequential=True)
    run_steps(model, tokenizer, edits[:1], callback, steps=1)
    assert len(callback._moments.chosen) == len(texts) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_steps(model, tokenizer, edits[1:2], callback, steps=1)
    assert callback._moments.chosen == texts
    torch.testing.assert_close(
        callback._moments.mean(NAME).double(), moment_of(world.load()[0], tokenizer, texts), rtol=1e-3, atol=1e-3
    )


def test_a_run_of_a_sequence_is_resumed_bit_for_bit_in_a_new_process(tokenizer, edits, tmp_path):
    models, callbacks = [world.load()[0] for _ in range(2)], [SubjectValues(TEXTS, sequential=True) for _ in range(2)]
    for model, callback in zip(models, callbacks, strict=True):
        run_steps(model, tokenizer, edits[:2], callback, layers="1-3")
    between = copy.deepcopy(models[1].state_dict())
    run_steps(models[0], tokenizer, edits[2:], callbacks[0], steps=4, layers="1-3")
    saved = run_steps(models[1], tokenizer, edits[2:], callbacks[1], steps=2, layers="1-3")[-1]
    # A new process has neither the earlier keys nor the model before the first run.
    new, after = world.load()[0], copy.deepcopy(models[1].state_dict())
    new.load_state_dict(between)
    callback = SubjectValues(TEXTS, sequential=True)
    with editing(
        new, [ParameterScope("1-3", modules=SCOPE), TokenLoss("cross_entropy"), callback], tokenizer=tokenizer,
        edits=edits[2:],
    ) as run:  # fmt: skip
        optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2, weight_decay=0.1)
        new.load_state_dict(after)
        torch.save(saved, tmp_path / "state.pt")
        run.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for _ in range(2):
            run.before_step()
            new(**batch_of(tokenizer, edits[2:])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reached = [parameter.detach().clone() for parameter in run.parameters()]
    expected = [models[0].get_parameter(NAME.replace("2", str(layer))) for layer in (1, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(reached, expected, strict=True))


def test_a_warning_says_that_the_examples_contain_none_of_the_edits(model, tokenizer, edits):
    other = EditDataset.load("world", limit=8)[4:]
    with pytest.warns(UserWarning, match="^SubjectValues: none of the first 32 training examples contains the prompt"):
        run_steps(model, tokenizer, edits, SubjectValues(TEXTS, edits=other), steps=8)


def test_a_warning_says_that_an_edit_shares_its_key_with_an_edit_of_an_earlier_run(model, tokenizer, edits):
    callback, (first, *_) = SubjectValues(TEXTS, sequential=True), edits
    run_steps(model, tokenizer, [first], callback, layers="1-3")
    begin = first.prompt[: first.prompt.index(first.subject) + len(first.subject)]
    with pytest.warns(UserWarning, match="1 of 1 edits .* of this run or of earlier runs"):
        run_steps(
            model, tokenizer, [Edit(f"{begin} is", "red", subject=first.subject)], callback, layers="1-3", steps=1
        )


def test_a_warning_says_which_edits_share_a_key(model, tokenizer, edits):
    twice = [edits[0], edits[1], edits[0]]
    with pytest.warns(UserWarning, match=r"^SubjectValues: 2 of 3 edits \(the first: .*have nearly the same keys"):
        run_steps(model, tokenizer, twice, SubjectValues(TEXTS, edits=twice), steps=1)


@pytest.mark.parametrize("changed", ["texts", "damping", "edits"])
def test_a_run_with_other_keys_cannot_be_resumed(model, tokenizer, edits, changed):
    saved = run_steps(model, tokenizer, edits, SubjectValues(TEXTS), steps=1)[-1]
    other = {
        "texts": SubjectValues(TEXTS[:9]),
        "damping": SubjectValues(TEXTS, damping=1.0),
        "edits": SubjectValues(TEXTS, edits=edits[:2]),
    }[changed]
    warnings.simplefilter("ignore")
    with pytest.raises(EditError, match=r"^SubjectValues: the checkpoint was written with other texts, edits or damp"):
        run_steps(model, tokenizer, edits, other, steps=1, state=saved)


def test_constraints_are_exact_beside_it(model, tokenizer, edits):
    before = model.get_parameter(NAME).detach().clone()
    mask = GradientMask("magnitude", density=0.25)
    run_steps(model, tokenizer, edits, SubjectValues(TEXTS), NormBall(1e-3), mask, steps=3)
    change = model.get_parameter(NAME).detach() - before
    assert 0 < int((change != 0).sum()) <= 0.25 * change.numel()
    assert float(change.abs().max()) <= 1e-3
    free = world.load()[0]
    history = run_steps(free, tokenizer, edits, SubjectValues(TEXTS), NullSpace(TEXTS, energy=0.5), steps=3)[2]
    assert history[-1]["edit/drift/null_space_leak"] < 1e-4


def test_without_a_subject_the_key_is_the_most_distinct_input_of_the_prompt(model, tokenizer, edits):
    base = world.load()[0]
    unnamed = [Edit(edit.prompt, edit.target) for edit in edits]
    with pytest.warns(UserWarning, match="^SubjectValues: 4 of 4 edits have no subject in their prompt"):
        run_steps(model, tokenizer, unnamed, SubjectValues(TEXTS, damping=0.5), steps=1)
    moment = moment_of(base, tokenizer)
    damped = moment / moment.diagonal().median() + 0.5 * torch.eye(len(moment), dtype=moment.dtype)
    keys = []
    for edit in unnamed:
        inputs = inputs_of(base, tokenizer, edit.prompt)[1:]
        keys.append(inputs[torch.einsum("ti,ij,tj->t", inputs, damped.inverse(), inputs).argmax()])
    duals, _ = dual_keys(torch.stack(keys), DampedMoment(moment, 0.5))
    change = (model.get_parameter(NAME) - base.get_parameter(NAME)).detach().double()
    outside = change - change @ torch.linalg.pinv(duals) @ duals
    assert float(outside.norm() / change.norm()) < 1e-3


def test_the_file_of_second_moments_is_read_by_later_runs(tokenizer, edits, tmp_path, monkeypatch):
    models, path = [world.load()[0] for _ in range(2)], tmp_path / "moments.safetensors"
    run_steps(models[0], tokenizer, edits, SubjectValues(TEXTS, factors_path=path))
    assert path.exists()
    monkeypatch.setattr("kedit_train.core.drift.factors_of_texts.input_moments", None)
    run_steps(models[1], tokenizer, edits, SubjectValues(TEXTS, factors_path=path))
    assert torch.equal(models[0].get_parameter(NAME), models[1].get_parameter(NAME))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"damping": 0}, "damping must be > 0"),
        ({"step_size": 0}, r"step_size must be in \(0, 1\]"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"sequential": "false"}, "sequential must be True or False, got 'false'"),
        ({"factors_path": "moments.bin"}, "factors_path must be a path that ends"),
    ],
)
def test_invalid_arguments_are_refused(wrong, expected):
    with pytest.raises(EditError, match=f"^SubjectValues: .*{expected}"):
        SubjectValues(TEXTS, **wrong)


def test_what_it_needs_is_said_before_the_first_step(model, tokenizer, edits):
    def attach(*callbacks, edits=edits):
        with editing(model, [scope(), *callbacks], tokenizer=tokenizer, edits=edits) as run:
            run.before_step()

    with pytest.raises(EditError, match=r"^SubjectValues: .*add TokenLoss"):
        attach(SubjectValues(TEXTS))
    with pytest.raises(EditError, match="the edits of this run are unknown"):
        attach(SubjectValues(TEXTS), TokenLoss("cross_entropy"), edits=None)
    with pytest.raises(EditError, match="keep only one of PolyakStep, SecondOrderLocality and SubjectValues"):
        attach(SubjectValues(TEXTS), PolyakStep(), TokenLoss("cross_entropy"))


def test_an_edit_with_its_subject_at_an_attention_sink_is_trained_at_a_later_token(edits):
    """The keys are chosen by the distinctness of the inputs: here, the inputs at the subject hardly differ."""
    from kedit_train.core.drift.linear_layers import find_linear_layers
    from kedit_train.core.drift.subject_keys import subject_keys

    model, tokenizer = world.load()
    subject = keys_of(model, tokenizer, edits)
    with editing(model, [scope()], tokenizer=tokenizer, edits=edits) as run:
        run.before_step()
        layers = find_linear_layers(model, {NAME: model.get_parameter(NAME)})

        def distinctness(name, keys):
            # Every input is distinct, except for that at the first subject.
            return torch.where((keys.double() - subject[0]).norm(dim=1) < 1e-3, 1e-3, 1.0 + keys[:, 0].double() ** 2)

        with pytest.warns(UserWarning, match="in 1 of 4 prompts .*, the subject is at the start of the text"):
            found = subject_keys(run.run, layers, list(edits), tokenizer, distinctness=distinctness, batch_size=2)[
                NAME
            ].double()
    torch.testing.assert_close(found[1:], subject[1:], rtol=1e-4, atol=1e-4)
    after = inputs_of(model, tokenizer, edits[0].prompt)
    end = int((after - subject[0]).norm(dim=1).argmin())
    best = end + 1 + int((after[end + 1 :, 0] ** 2).argmax())
    torch.testing.assert_close(found[0], after[best], rtol=1e-4, atol=1e-4)
