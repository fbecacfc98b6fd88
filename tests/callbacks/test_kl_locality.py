"""KLLocality against a second copy of the model: full softmax in fp64 at every token of the texts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kedit_train.callbacks import KLLocality, ParameterScope, Texts, TokenSmoothing, editing
from kedit_train.data import Edit
from kedit_train.errors import EditError

TEXTS = ["w1 w2 w3 w4 w5", "w9", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30", "w7 w7 w7", "w50 w40 w30 w20"]


def divergence(before: Tensor, now: Tensor, direction: str) -> Tensor:
    p, q = before.double().softmax(-1), now.double().softmax(-1)
    if direction == "reverse":
        p, q = q, p
    if direction == "jsd":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    return (p * (p / q).log()).sum(-1)


def by_hand(before: Any, now: Any, tokenizer: Any, texts: list[str], direction: str = "forward") -> Tensor:
    """Return the mean divergence over all tokens; each text is read alone, without padding."""
    terms = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            reference = before(input_ids=ids).logits[0]
        terms.append(divergence(reference, now(input_ids=ids).logits[0], direction))
    return torch.cat(terms).mean()


def shake(model: Any, size: float = 0.1) -> None:
    """Change all trainable parameters, in place of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_equals_by_hand(model: Any, scope: ParameterScope, words: Any, direction: Any = "forward") -> None:
    before = copy.deepcopy(model).eval()
    kl = KLLocality(TEXTS, weight=0.7, direction=direction, batch_size=len(TEXTS))
    with editing(model, [kl, scope], tokenizer=words) as edit:
        for callback in edit.run.callbacks:
            edit.run.attach(callback)
        assert kl.penalty(edit.run).item() == pytest.approx(0, abs=1e-6)
        shake(model)
        got = kl.penalty(edit.run)
        want = 0.7 * by_hand(before, model.eval(), words, TEXTS, direction)
        assert want.item() > 1e-3
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        wanted = gradients(want.float(), model)
        for name, grad in gradients(got, model).items():
            assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_value_and_gradient(make, words, direction, family):
    assert_equals_by_hand(make(family), ParameterScope(1, modules="mlp"), words, direction)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["lm_head", "mlp"], ["embed_tokens"], "*"])
def test_the_output_head_and_tied_embeddings_may_be_in_the_scope(make, words, tied, modules):
    assert_equals_by_hand(make(tie_word_embeddings=tied), ParameterScope(modules=modules), words)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj", "lm_head"]])
def test_with_adapters(make, words, targets):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert_equals_by_hand(model, ParameterScope(modules="*"), words)


def test_in_fp64_and_in_chunks(make, words, monkeypatch):
    monkeypatch.setattr("kedit_train.callbacks.kl_locality.chunk_length", lambda vocabulary: 3)
    assert_equals_by_hand(make(dtype=torch.float64), ParameterScope(0), words)


def test_the_reference_stays_the_model_before_the_edit(make, words, ids):
    model = make()
    before = copy.deepcopy(model).eval()
    kl = KLLocality(TEXTS, weight=1.0, batch_size=len(TEXTS))
    with editing(model, [ParameterScope(1), TokenSmoothing(), kl], tokenizer=words, log_every_n_steps=1) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for _ in range(4):
            want = by_hand(before, model, words, TEXTS).item()
            edit.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert edit.history[-1]["edit/locality/kl"] == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert want > 1e-3


def test_a_larger_weight_keeps_the_model_closer(make, words, ids):
    def drift(weight: float) -> float:
        torch.manual_seed(0)
        model = make()
        before = copy.deepcopy(model)
        with editing(
            model, [ParameterScope(modules="*"), KLLocality(TEXTS, weight=weight, batch_size=5)], tokenizer=words
        ) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
            for _ in range(10):
                edit.before_step()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return by_hand(before, model, words, TEXTS).item()

    assert drift(10.0) < 0.2 * drift(0.0)


def test_a_weight_of_zero_has_no_gradient(make, words):
    model = make()
    with editing(model, [ParameterScope(1), kl := KLLocality(TEXTS, weight=0.0)], tokenizer=words) as edit:
        edit.before_step()
        shake(model)
        loss = kl.penalty(edit.run)
        assert loss.item() == 0.0
        assert not any(g.any() for g in gradients(loss, model).values())


def test_dropout_does_not_count_as_change(make, words):
    model = make("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with editing(
        model, [ParameterScope(1), kl := KLLocality(TEXTS, weight=1.0, batch_size=5)], tokenizer=words
    ) as edit:
        edit.before_step()
        assert kl.metrics(edit.run)["edit/locality/kl"] == pytest.approx(0, abs=1e-6)
        assert model.training
        assert model.transformer.h[0].attn.attn_dropout.training


def test_texts_are_drawn_in_an_order_that_depends_on_the_seed_only(make, words):
    def order(seed: int) -> list[int]:
        kl = KLLocality(Texts(TEXTS, seed=seed))
        with editing(make(), [kl], tokenizer=words) as edit:
            edit.run.attach(kl)
            return [i for _ in range(3) for i in kl._batches.texts.draw(5)]

    first = order(0)
    assert [sorted(first[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert first[:5] != first[5:10]
    assert order(0) == first
    assert order(1) != first


@pytest.mark.parametrize("limit", [2, 4])
def test_long_texts_are_split_at_the_context_length(make, words, limit):
    model = make(max_position_embeddings=limit)
    before = copy.deepcopy(model)
    parts = [TEXTS[2].split()[i : i + limit] for i in range(0, 11, limit)]
    with editing(model, [kl := KLLocality(TEXTS[2:3], weight=1.0, batch_size=len(parts))], tokenizer=words) as edit:
        for callback in edit.run.callbacks:
            edit.run.attach(callback)
        shake(model)
        want = by_hand(before, model, words, [" ".join(part) for part in parts])
        assert kl.penalty(edit.run).item() == pytest.approx(want.item(), rel=1e-5)


def test_prompts_that_the_edit_is_scored_on_are_left_out(make, words):
    with editing(make(), [kl := KLLocality(TEXTS)], tokenizer=words) as edit:
        edit.run.edits = [Edit(prompt="w20 w21", target="w5"), Edit(prompt="x", target="y", rephrases=("w7 w7",))]
        with pytest.warns(UserWarning, match="KLLocality: 2 of 5 texts contain an evaluation prompt"):
            edit.before_step()
        assert [len(row) for row in kl._batches.texts.sequences] == [5, 1, 4]


def test_a_generator_of_texts_serves_two_runs(make, words):
    kl = KLLocality(text for text in TEXTS)
    for _ in range(2):
        with editing(make(), [kl], tokenizer=words) as edit:
            edit.before_step()
            assert len(kl._batches.texts.sequences) == len(TEXTS)


@pytest.mark.parametrize(("name", "write"), [("a.txt", "\n".join), ("a.json", json.dumps)])
def test_texts_from_a_file(make, words, tmp_path, name, write: Callable[[list[str]], str]):
    (tmp_path / name).write_text(write(TEXTS))
    with editing(make(), [kl := KLLocality(tmp_path / name)], tokenizer=words) as edit:
        edit.before_step()
        assert len(kl._batches.texts.sequences) == len(TEXTS)


def test_an_empty_file_is_an_error_before_training(make, words, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(EditError) as error:
        editing(make(), [KLLocality(tmp_path / "empty.txt")], tokenizer=words).__enter__()
    assert str(error.value) == (
        f"KLLocality: {tmp_path / 'empty.txt'} contains no text; pass texts on which the model should not change."
    )


def test_a_missing_tokenizer_is_an_error(make):
    with (
        editing(make(), [KLLocality(TEXTS)]) as edit,
        pytest.raises(EditError, match=r"^KLLocality: no tokenizer found"),
    ):
        edit.before_step()


@pytest.mark.parametrize("tied", [False, True])
def test_without_a_scope_the_head_before_the_edit_is_kept(make, words, tied):
    model = make(tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    with editing(model, [kl := KLLocality(TEXTS, weight=1.0, batch_size=len(TEXTS))], tokenizer=words) as edit:
        edit.before_step()
        shake(model)
        assert kl.penalty(edit.run).item() == pytest.approx(by_hand(before, model, words, TEXTS).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be >= 0, got -1.0."),
        ({"weight": float("nan")}, "weight must be >= 0, got nan."),
        ({"direction": "both"}, 'direction must be "forward", "reverse" or "jsd", got \'both\'.'),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0."),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(EditError) as error:
        KLLocality(TEXTS, **options)
    assert str(error.value) == f"KLLocality: {message}"


def test_nearest_texts_are_those_related_to_the_edits(make, words):
    texts = [*TEXTS, "w8 w40", "w30 w2"]
    kl = KLLocality(Texts(texts, nearest=2), batch_size=8)
    edits = [Edit("w5 w2", "w3", subject="w5", old_target="w30")]
    with editing(make(), [kl], tokenizer=words, edits=edits) as edit:
        edit.run.attach(kl)
        decoded = [words.decode(sequence) for sequence in kl._batches.texts.sequences]
        assert sorted(decoded) == sorted(["w30 w2", TEXTS[2]])
        # A batch takes each text at most once.
        assert sorted(kl._batches.draw(8)[0]) == [0, 1]


def test_nearest_needs_edits_and_a_single_run(make, words):
    with (
        pytest.raises(
            EditError, match=r"KLLocality: nearest=2 selects .* similar to the edits, but the edits of this run"
        ),
        editing(make(), [KLLocality(Texts(TEXTS, nearest=2))], tokenizer=words) as edit,
    ):
        edit.before_step()
    edits = [Edit("w5 w2", "w3", subject="w5", old_target="w30")]
    with (
        pytest.raises(EditError, match=r"KLLocality: every text contains the subject and the old answer of an edit"),
        editing(make(), [KLLocality(Texts(["w30 w5", "w5 w9 w30"], nearest=2))], tokenizer=words, edits=edits) as edit,
    ):
        edit.before_step()
    with pytest.raises(EditError, match=r"^KLLocality: sequential=True cannot be combined with Texts\(nearest=\)"):
        KLLocality(Texts(TEXTS, nearest=2), sequential=True)
    assert "nearest=2" in repr(KLLocality(Texts(TEXTS, nearest=2)))


def test_a_checkpoint_of_a_run_with_other_texts_is_an_error(make, words):
    edits = [Edit("w5 w2", "w3", old_target="w30")]
    states = []
    for nearest in (2, 2, 3):
        kl = KLLocality(Texts(TEXTS, nearest=nearest))
        with editing(make(), [kl], tokenizer=words, edits=edits) as edit:
            edit.run.attach(kl)
            if states and nearest == 3:
                with pytest.raises(EditError, match="the checkpoint was written with other reference texts"):
                    kl.load_state(states[0])
            elif states:
                kl.load_state(states[0])
            states.append(kl.state())
