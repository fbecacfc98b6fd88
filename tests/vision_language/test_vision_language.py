"""Text edits of a tiny model in the shape of Qwen2.5-VL, with images in the batches.

The vision tower has the same depth and the same module names as the language model, so that a test fails if one is
taken for the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from callbacks.inputs import principal, share_of
from torch import Tensor
from torch.nn import functional as F
from vision_models import (
    IMAGES,
    LAYERS,
    SCOPE,
    TEXTS,
    VISION,
    batch_of,
    build_model,
    scope,
    train,
)

from kedit_train import EditError
from kedit_train.callbacks import (
    BatchAnchor,
    KLLocality,
    NullSpace,
    ParameterScope,
    SubjectTokens,
    TokenLoss,
    editing,
)
from kedit_train.core.scope.scope import find_layers, resolve_scope
from kedit_train.functional import overtone


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    own = {name: p for name, p in model.named_parameters() if name in SCOPE}
    return dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert len(found) == 2
    for name, gradient in found.items():
        assert float(expected[name].norm()) > 0
        torch.testing.assert_close(gradient, expected[name], rtol=2e-4, atol=2e-6)


def logits_and_labels(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits at the positions that predict a label, [N, vocabulary], and the labels [N]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    where = batch["labels"][:, 1:] != -100
    return model(**inputs, use_cache=False).logits[:, :-1][where], batch["labels"][:, 1:][where]


def shake(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


# -- scope


@pytest.mark.parametrize("depth", [3, 5])
def test_layers_and_patterns_select_the_language_model(processor, depth):
    model = build_model(processor.tokenizer, vision_depth=depth)
    down = [f"{LAYERS}.{i}.mlp.down_proj.weight" for i in range(3)]
    assert find_layers(model) == (LAYERS, 3)
    assert list(resolve_scope(model, None, "mlp.down_proj.weight")) == down
    assert list(resolve_scope(model, "0.4-1.0", "mlp.down_proj.weight")) == down[1:]
    assert list(resolve_scope(model, -1, "down_proj")) == down[2:]
    # The embeddings and the output head belong to the language model.
    assert list(resolve_scope(model, None, ["embed_tokens", "lm_head"])) == [
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert not any(name.startswith(VISION) for name in resolve_scope(model, None, None))


def test_the_vision_tower_is_selected_by_its_name(model):
    chosen = list(resolve_scope(model, None, "visual.blocks.*.mlp.down_proj.weight"))
    assert chosen == [f"model.visual.blocks.{i}.mlp.down_proj.weight" for i in range(3)]
    assert len(resolve_scope(model, None, "*")) == len(list(model.parameters()))
    with pytest.raises(EditError) as error:
        resolve_scope(model, None, "blocks.*.mlp")
    assert str(error.value) == (
        "modules='blocks.*.mlp' matches only parameters outside of the language model, which stay frozen unless a "
        "pattern contains the name of their part; select other modules, or write 'visual' in the pattern, for example "
        "modules='visual.*'."
    )


def test_adapters_of_the_vision_tower_are_not_selected(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    assert any("visual" in name and "lora_A" in name for name, _ in adapted.named_parameters())
    chosen = list(resolve_scope(adapted, "1-2", "down_proj"))
    assert len(chosen) == 4
    assert list(resolve_scope(adapted, None, "layers.1.mlp.down_proj")) == chosen[:2]
    assert not any("visual" in name for name in resolve_scope(adapted, None, "down_proj"))


# -- losses and penalties


@pytest.mark.parametrize("positions", [None, 3, 4])
@pytest.mark.parametrize("objective", ["cross_entropy", "overtone"])
def test_the_token_loss_with_images(model, processor, edits, objective, positions):
    batch = batch_of(processor, edits, IMAGES)
    if positions:
        mask = batch["attention_mask"]
        own = model.model.get_rope_index(**{k: v for k, v in batch.items() if k not in ("labels", "pixel_values")})[0]
        text = (mask.cumsum(-1) - 1).clamp(min=0)[None]
        batch["position_ids"] = torch.cat([text, own]) if positions == 4 else own
    logits, labels = logits_and_labels(model, batch)
    score: Callable[..., Any] = overtone if objective == "overtone" else F.cross_entropy
    options = {"vocab_size": len(processor.tokenizer)} if objective == "overtone" else {"reduction": "none"}
    losses = score(logits, labels, **options)
    losses = losses[0] if isinstance(losses, tuple) else losses
    lengths = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    expected = torch.stack([row.mean() for row in losses.split(lengths)]).mean()
    wanted = gradients(model, expected)
    # The image must matter, or the test would say nothing about images.
    other = logits_and_labels(model, batch | {"pixel_values": batch["pixel_values"].flip(0)})[0]
    assert not torch.allclose(other, logits, atol=1e-3)
    loss = TokenLoss(objective, reduction="sample")
    with editing(model, [scope(), loss], tokenizer=processor) as edit:
        edit.before_step()
        found = model(**batch).loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(gradients(model, found), wanted)


def kl(before: Tensor, now: Tensor) -> Tensor:
    p, q = before.double().log_softmax(-1), now.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_the_kl_penalty_on_texts_beside_images(model, processor, edits):
    """The penalty is the same before and after a batch with images."""
    before = copy.deepcopy(model)
    batch = batch_of(processor, edits, IMAGES)
    penalty = KLLocality(TEXTS, weight=0.7, batch_size=len(TEXTS))
    with editing(model, [scope(), penalty, TokenLoss()], tokenizer=processor.tokenizer) as edit:
        edit.before_step()
        shake(model)
        terms = []
        for text in TEXTS:
            ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
            terms.append(kl(before(input_ids=ids).logits[0].detach(), model(input_ids=ids).logits[0]))
        expected = 0.7 * torch.cat(terms).mean()
        wanted = gradients(model, expected.float())
        for _ in range(2):
            found = penalty.penalty(edit.run)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)
            assert_same_gradients(gradients(model, found), wanted)
            model(**batch)


def test_the_batch_anchor_with_one_image(model, processor, edits):
    before = copy.deepcopy(model)
    batch = batch_of(processor, edits[:1], [True])
    with editing(model, [scope(), BatchAnchor(weight=0.7)], tokenizer=processor.tokenizer) as edit:
        edit.before_step()
        shake(model)
        (logits, labels), (reference, _) = logits_and_labels(model, batch), logits_and_labels(before, batch)
        expected = (F.cross_entropy(logits, labels, reduction="none") + 0.7 * kl(reference.detach(), logits)).mean()
        wanted = gradients(model, expected.float())
        assert_same_gradients(gradients(model, model(**batch).loss), wanted)
        # A second example with the same text and another image has another reference.
        other = batch | {"pixel_values": -batch["pixel_values"]}
        (logits, labels), (reference, _) = logits_and_labels(model, other), logits_and_labels(before, other)
        expected = (F.cross_entropy(logits, labels, reduction="none") + 0.7 * kl(reference.detach(), logits)).mean()
        assert model(**other).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("images", [True, False])
def test_null_space_on_texts_and_on_inputs_with_images(model, processor, edits, images):
    batch = batch_of(processor, edits, IMAGES)
    kept = {name: value for name, value in batch.items() if name != "labels"}
    inputs: dict[str, list[Tensor]] = {name: [] for name in SCOPE}
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, own=own: own.append(args[0].detach())
        )
        for name, own in inputs.items()
    ]
    if images:
        model(**kept)
        real = kept["attention_mask"].bool()
        vectors = {name: own[0][real] for name, own in inputs.items()}
    else:
        for text in TEXTS:
            model(input_ids=torch.tensor([processor.tokenizer(text)["input_ids"]]))
        vectors = {name: torch.cat([one[0] for one in own]) for name, own in inputs.items()}
    for handle in handles:
        handle.remove()
    directions = {name: principal(own.double().T, 0.9) for name, own in vectors.items()}
    before = {name: model.get_parameter(name).detach().clone() for name in SCOPE}
    callback = NullSpace([kept] if images else TEXTS)
    train(model, processor, batch, [scope(), callback])
    for name in SCOPE:
        change = model.get_parameter(name).detach().double() - before[name].double()
        assert float(change.norm()) > 0
        assert share_of(change, directions[name]) < 1e-5


def test_subject_tokens_with_images(model, processor, edits):
    """The reference: outer products of the layer's inputs and output gradients at the tokens of the subjects."""
    names = [f"{LAYERS}.{i}.mlp.down_proj.weight" for i in (0, 1)]
    batch = batch_of(processor, edits, IMAGES)
    chosen = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for row, edit in enumerate(edits):
        text = processor.tokenizer.decode(batch["input_ids"][row])
        start = text.index(edit.subject)
        ends = [len(processor.tokenizer.decode(batch["input_ids"][row, : i + 1])) for i in range(chosen.shape[1])]
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            chosen[row, i] = begin < start + len(edit.subject) and start < end
    assert chosen.any(1).all()
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return hook

    handles = [model.get_submodule(n.removesuffix(".weight")).register_forward_hook(keep(n)) for n in names]
    model(**batch).loss.backward()
    wanted = {n: torch.einsum("bto,bti->oi", out.grad * chosen[..., None], x) for n, (x, out) in seen.items()}
    for handle in handles:
        handle.remove()
    model.zero_grad()
    # At the tokens of the subject, the last layer has no gradient, because nothing reads its output there.
    callbacks = [ParameterScope("0-1", modules="mlp.down_proj.weight"), TokenLoss(), SubjectTokens()]
    with editing(model, callbacks, tokenizer=processor.tokenizer, edits=edits, log_every_n_steps=1) as run:
        run.before_step()
        model(**batch).loss.backward()
        found = {name: model.get_parameter(name).grad.clone() for name in names}
        assert run.run.collect()["edit/scope/subject_examples"] == 1.0
    assert_same_gradients(found, wanted)
