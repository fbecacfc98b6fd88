"""SubjectTokens: the weights in scope get gradients from the tokens of the subject only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kedit_train import EditDataset, world
from kedit_train.callbacks import KLLocality, ParameterScope, PrefixCache, SubjectTokens, TokenLoss, editing
from kedit_train.core.scope.subject_positions import SubjectPositions
from kedit_train.data import Edit
from kedit_train.errors import EditError

SCOPE = "mlp.down_proj.weight"


@pytest.fixture(scope="module")
def loaded():
    return world.load()


@pytest.fixture
def model():
    return world.load()[0]


@pytest.fixture(scope="module")
def edits():
    return EditDataset.load("world", limit=4)


def batch_of(tokenizer, edits, before: str = ""):
    texts = [f"{before}{edit.prompt} {edit.target}" for edit in edits]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def gradients(model, tokenizer, callbacks, batch, edits):
    with editing(model, callbacks, tokenizer=tokenizer, edits=edits) as run:
        run.before_step()
        model.zero_grad()
        model(**batch).loss.backward()
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: p.grad.clone() for p in run.parameters()}


def expected_gradient(model, batch, name, chosen):
    """The sum of outer products over the chosen positions, from the inputs and output gradients of the layer."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    seen = {}
    handle = layer.register_forward_hook(
        lambda module, args, output: seen.update(inputs=args[0].detach(), output=output) or output.retain_grad()
    )
    for p in model.parameters():
        p.requires_grad_(True)
    model(**batch).loss.backward()
    handle.remove()
    model.zero_grad()
    return torch.einsum("bto,bti->oi", seen["output"].grad * chosen[..., None], seen["inputs"])


def positions_by_offsets(tokenizer, batch, edits, before=""):
    """Where the subjects are, from the character offsets of the tokenizer."""
    chosen = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for row, edit in enumerate(edits):
        text = f"{before}{edit.prompt} {edit.target}"
        start = len(before) + edit.prompt.index(edit.subject)
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        columns = batch["attention_mask"][row].nonzero().squeeze(-1)
        for column, (begin, end) in zip(columns, offsets, strict=True):
            chosen[row, column] = begin < start + len(edit.subject) and start < end
    return chosen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("before", ["", "It rained in the night. "])
def test_the_positions_are_those_of_the_subjects(loaded, edits, side, before):
    tokenizer = loaded[1]
    own, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        batch = batch_of(tokenizer, edits, before)
    finally:
        tokenizer.padding_side = own
    positions = SubjectPositions(tokenizer, edits)
    found = positions.find(batch["input_ids"], batch["attention_mask"].bool())
    assert torch.equal(found, positions_by_offsets(tokenizer, batch, edits, before))
    assert found.any(1).all()
    assert not found.all(1).any()
    assert (positions.rows, positions.found) == (4, 4)


def test_rows_without_a_prompt_and_packed_rows(loaded, edits):
    tokenizer = loaded[1]
    positions = SubjectPositions(tokenizer, [*edits[:2], Edit("The moon is", "full")])
    ids = tokenizer(["The moon is full", f"The editor met {edits[0].subject}"], padding=True, return_tensors="pt")
    assert positions.find(ids["input_ids"], ids["attention_mask"].bool()).all()
    assert positions.found == 0
    rows = [tokenizer(f"{edit.prompt} {edit.target}").input_ids for edit in edits[:2]]
    packed = torch.tensor([rows[0] + rows[1]])
    found = positions.find(packed, torch.ones_like(packed, dtype=torch.bool))
    alone = [positions.find(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)) for row in rows]
    assert torch.equal(found, torch.cat(alone, dim=1))


def test_a_subject_that_is_only_the_first_token_stands_for_its_whole_prompt(model, loaded):
    tokenizer = loaded[1]

    def ids(text):
        # The bundled tokenizer begins with a special token. Many tokenizers of pretrained models do not.
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

    edit = Edit("The moon is", "full", subject="The")
    length = ids(edit.prompt).shape[1]
    row = ids("The moon is full")
    positions = SubjectPositions(tokenizer, [edit])
    found = positions.find(row, torch.ones_like(row, dtype=torch.bool))
    assert found[0].tolist() == [True] * length + [False] * (row.shape[1] - length)
    assert positions.whole_prompts == 1
    # After another token, the subject alone is chosen.
    later = ids("It rained. The moon is full")
    assert positions.find(later, torch.ones_like(later, dtype=torch.bool)).sum() == 1
    assert positions.whole_prompts == 1
    callbacks = [ParameterScope("0.4-0.8", modules=SCOPE), SubjectTokens()]
    with editing(model, callbacks, tokenizer=tokenizer, edits=[edit]) as run:
        optimizer = torch.optim.SGD(run.parameters(), lr=1e-3)
        run.before_step()
        model(row, labels=row).loss.backward()
        with pytest.warns(UserWarning, match="SubjectTokens: a training example begins with a subject of only one"):
            optimizer.step()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_the_gradient_is_the_sum_over_the_tokens_of_the_subject(model, loaded, edits, checkpointing, cached):
    tokenizer = loaded[1]
    batch = batch_of(tokenizer, edits)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    callbacks = [ParameterScope("0.4-0.8", modules=SCOPE), SubjectTokens(), *([PrefixCache()] if cached else [])]
    found = gradients(model, tokenizer, callbacks, batch, edits)
    assert len(found) > 1
    model.gradient_checkpointing_disable()
    chosen = positions_by_offsets(tokenizer, batch, edits)
    for name, gradient in found.items():
        expected = expected_gradient(model, batch, name, chosen)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
        assert not torch.allclose(gradient, expected_gradient(model, batch, name, torch.ones_like(chosen)), rtol=1e-2)


def test_penalties_on_texts_are_trained_at_all_tokens(loaded, edits):
    """The gradient of the KL penalty is the same with and without SubjectTokens."""

    def penalty(*callbacks):
        model = world.load()[0]
        # The texts are prompts of edits, so their subjects are found if they are searched for.
        texts = [f"{edit.prompt} nothing else." for edit in edits[1:]]
        locality = KLLocality(texts, weight=5.0, batch_size=3)
        callbacks = [ParameterScope(0.6, modules=SCOPE), locality, *callbacks]
        with editing(model, callbacks, tokenizer=loaded[1], edits=edits[:1]) as run:
            (weight,) = run.parameters()
            optimizer = torch.optim.SGD([weight], lr=1.0)
            run.before_step()
            weight.grad += 0.02
            optimizer.step()
            optimizer.zero_grad()
            run.before_step()
            return weight.grad.clone()

    alone = penalty()
    assert alone.any()
    torch.testing.assert_close(penalty(SubjectTokens(edits=edits[1:])), alone)


def test_loss_and_logits_do_not_change(model, loaded, edits):
    tokenizer = loaded[1]
    batch = batch_of(tokenizer, edits)
    before = model(**batch)
    with editing(model, [ParameterScope(0.6, modules=SCOPE), SubjectTokens()], tokenizer=tokenizer, edits=edits) as run:
        run.before_step()
        after = model(**batch)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.loss, before.loss)
    assert torch.equal(model(**batch).logits, before.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_several_lora_factors_and_the_rest_of_the_model(loaded, edits):
    from peft import LoraConfig, get_peft_model

    tokenizer = loaded[1]
    model = get_peft_model(world.load()[0], LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    batch = batch_of(tokenizer, edits)
    chosen = positions_by_offsets(tokenizer, batch, edits)
    found = gradients(model, tokenizer, [TokenLoss(), SubjectTokens()], batch, edits)
    assert {"lora_A" in name for name in found} == {True, False}
    name = next(name for name in found if "lora_B" in name)
    torch.testing.assert_close(found[name], expected_gradient(model, batch, name, chosen), atol=1e-6, rtol=1e-4)


def test_metrics(model, loaded, edits):
    tokenizer = loaded[1]
    batch = batch_of(tokenizer, edits)
    callbacks = [ParameterScope(0.6, modules=SCOPE), SubjectTokens()]
    with editing(model, callbacks, tokenizer=tokenizer, edits=edits[:2], log_every_n_steps=1) as run:
        optimizer = torch.optim.SGD(run.parameters(), lr=1e-3)
        run.before_step()
        model(**batch).loss.backward()
        optimizer.step()
    chosen = positions_by_offsets(tokenizer, batch, edits)
    real = batch["attention_mask"].bool()
    share = (int(chosen[:2].sum()) + int(real[2:].sum())) / int(real.sum())
    assert run.history[-1]["edit/scope/subject_examples"] == 0.5
    assert run.history[-1]["edit/scope/subject_share"] == pytest.approx(share)


def test_edits_without_a_subject_are_counted(model, loaded, edits):
    own = [edits[0], replace(edits[1], subject=None), replace(edits[2], subject="The moon")]
    with (
        pytest.warns(UserWarning, match=r"^SubjectTokens: 2 of 3 edits have no subject in their prompt"),
        editing(model, [ParameterScope(0.6, modules=SCOPE), SubjectTokens()], tokenizer=loaded[1], edits=own) as run,
    ):
        run.before_step()


def test_training_data_without_the_edits_gets_one_warning(model, loaded, edits):
    tokenizer = loaded[1]
    batch = {k: v.repeat(8, 1) for k, v in batch_of(tokenizer, edits).items()}
    others = EditDataset.load("world", limit=8)[4:]
    with editing(model, [ParameterScope(0.6, modules=SCOPE), SubjectTokens(edits=others)], tokenizer=tokenizer) as run:
        optimizer = torch.optim.SGD(run.parameters(), lr=1e-6)
        run.before_step()
        model(**batch).loss.backward()
        with pytest.warns(UserWarning, match="none of the first 32 training examples contains the prompt and the subj"):
            optimizer.step()


@pytest.mark.parametrize(
    ("callbacks", "given", "message"),
    [
        ([ParameterScope(0.6, modules=SCOPE)], None, "SubjectTokens: the edits of this run are unknown; pass edits="),
        ([ParameterScope(0.6, modules="input_layernorm")], "edits", "SubjectTokens: every parameter in scope must be"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(model, loaded, edits, callbacks, given, message):
    with (
        editing(model, [*callbacks, SubjectTokens()], tokenizer=loaded[1], edits=edits if given else None) as run,
        pytest.raises(EditError) as error,
    ):
        run.before_step()
    assert str(error.value).startswith(message)


def test_a_scope_outside_of_the_blocks_is_refused(loaded, edits):
    config = world.load()[0].config
    config.tie_word_embeddings = False
    model = type(loaded[0])(config)
    scope = ParameterScope(modules=["lm_head.weight", SCOPE])
    with (
        editing(model, [scope, SubjectTokens()], tokenizer=loaded[1], edits=edits) as run,
        pytest.raises(EditError, match=r"^SubjectTokens: every weight in scope must be inside the decoder blocks"),
    ):
        run.before_step()


def test_embeddings_and_reentrant_checkpointing_are_refused(model, loaded, edits):
    tokenizer = loaded[1]
    batch = batch_of(tokenizer, edits)
    with editing(model, [ParameterScope(0.6, modules=SCOPE), SubjectTokens()], tokenizer=tokenizer, edits=edits) as run:
        run.before_step()
        with pytest.raises(EditError, match=r"^SubjectTokens: the model must receive input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), labels=batch["labels"])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with editing(model, [ParameterScope(0.6, modules=SCOPE), SubjectTokens()], tokenizer=tokenizer, edits=edits) as run:
        run.before_step()
        loss = model(**batch).loss
        with pytest.raises(EditError, match="use_reentrant"):
            loss.backward()
