"""Apply gives the edited model and revert the base, bit for bit, for modules, state dicts and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from delta.tiny import DOWN, equal_bits, integers, state_of
from transformers import AutoModelForCausalLM

from kedit_train import EditDelta, EditError
from kedit_train.data import Edit, EditDataset

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def through_a_file(delta: EditDelta, folder: Path) -> EditDelta:
    return EditDelta.load(delta.save(folder / "a folder" / "edit.safetensors"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight"], ids=["matrix", "embedding"])
def test_apply_and_revert_are_exact(dtype, tied, name, make, tmp_path):
    base, trained = make(dtype, tie_word_embeddings=tied), make(dtype, tie_word_embeddings=tied)
    with torch.no_grad():
        weight = trained.get_parameter(name)
        weight += torch.randn_like(weight) * 0.1
        # Bit patterns that arithmetic does not preserve: signed zeros, a NaN with a payload, infinities.
        weight.view(-1)[:3] = torch.tensor([-0.0, torch.inf, 0.0], dtype=dtype)
        base.get_parameter(name).view(-1)[:3] = torch.tensor([0.0, 1.0, -0.0], dtype=dtype)
        weight.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)[5] = (
            0x7FC12345 if dtype == torch.float32 else 0x7FE5
        )
    old, new = state_of(base), state_of(trained)
    delta = through_a_file(EditDelta.between(base, trained), tmp_path)
    assert list(delta.changes) == [name]
    assert delta.verify(base, full=True) == "base"
    assert delta.apply(base) is base
    assert equal_bits(state_of(base), new)
    assert delta.verify(base, full=True) == "edited"
    delta.revert(base)
    assert equal_bits(state_of(base), old)
    # Tied weights stay one tensor.
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    if tied and name != DOWN:
        assert delta.changes[name].tied == ("lm_head.weight",)


def test_modules_state_dicts_and_folders_give_the_same_delta(make, edited, tmp_path):
    base, trained = make(torch.bfloat16, tie_word_embeddings=True), edited(torch.bfloat16, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    trained.save_pretrained(tmp_path / "edited", max_shard_size="4KB")
    assert len(list((tmp_path / "edited").glob("*.safetensors"))) > 2
    pairs: list[tuple[Any, Any]] = [
        (base, trained),
        (base.state_dict(), trained.state_dict()),
        (tmp_path / "base", str(tmp_path / "edited")),
        (tmp_path / "base", trained),
    ]
    deltas = [EditDelta.between(*pair) for pair in pairs]
    fingerprints = {delta.meta["base"]["fingerprint"] for delta in deltas}
    assert len(fingerprints) == 1
    for delta in deltas:
        assert {name: change.layout for name, change in delta.changes.items()} == {
            DOWN: "dense",
            "model.layers.0.self_attn.q_proj.weight": "columns",
        }
        state = state_of(base)
        delta.apply(state)
        assert equal_bits(state, state_of(trained))


@pytest.mark.parametrize("case", ["dense", "rows", "columns", "entries", "vector", "number", "four dimensions"])
def test_the_layout_is_the_smallest_and_exact(case, tmp_path):
    shape = {"vector": (50,), "number": (), "four dimensions": (6, 3, 4, 5)}.get(case, (30, 20))
    base, after = torch.randn(shape), torch.empty(0)
    after = base.clone()
    places: Any = {
        "dense": slice(None),
        "rows": [3, 17, 29],
        "columns": (slice(None), [0, 19]),
        "entries": ([1, 5, 29], [7, 0, 19]),
        "vector": [4, 49],
        "number": ...,
        "four dimensions": [2],
    }[case]
    after[places] += 1.0
    delta = through_a_file(EditDelta.between({"w": base}, {"w": after}), tmp_path)
    change = delta.changes["w"]
    names = {"vector": "entries", "number": "dense", "four dimensions": "rows"}
    assert change.layout == names.get(case, case)
    assert torch.equal(delta.difference("w"), after - base)
    changed = {"rows": 60, "columns": 60, "entries": 3, "vector": 2, "four dimensions": 60}.get(case, base.numel())
    assert change.before.numel() == change.after.numel() == changed
    state = {"w": base.clone()}
    assert torch.equal(integers(delta.apply(state)["w"]), integers(after))
    assert torch.equal(integers(delta.revert(state)["w"]), integers(base))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_other_dtypes_are_kept(dtype, tmp_path):
    base = torch.randint(0, 2, (8, 6)).to(dtype)
    after = base.clone()
    after[1] = torch.tensor([1, 0, 1, 1, 0, 1]).to(dtype)
    after[2, 3] = torch.ones(()).to(dtype) if not bool(base[2, 3]) else torch.zeros(()).to(dtype)
    delta = through_a_file(EditDelta.between({"w": base}, {"w": after}), tmp_path)
    state = {"w": base.clone()}
    assert equal_bits(delta.apply(state), {"w": after})
    assert equal_bits(delta.revert(state), {"w": base})
    if dtype.is_floating_point:
        assert delta.difference("w").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    else:
        with pytest.raises(EditError, match="arithmetic with deltas needs floating-point tensors"):
            delta.difference("w")


def test_deltas_of_different_tensors_can_be_reverted_in_any_order(make):
    base = make()
    old = state_of(base)
    deltas = []
    for name in (DOWN, "model.norm.weight"):
        other = make()
        with torch.no_grad():
            other.get_parameter(name).mul_(1.5)
        deltas.append(EditDelta.between(base, other))
    deltas[0].apply(base)
    deltas[1].apply(base)
    with pytest.raises(EditError, match="differs from the base model in tensors that the delta does not change"):
        deltas[0].verify(base, full=True)
    deltas[0].revert(base)
    deltas[1].revert(base)
    assert equal_bits(state_of(base), old)


def test_metadata_of_base_edits_and_run_is_recorded(make, edited, tmp_path):
    edits = EditDataset([Edit("a", "b"), Edit("c", "d")])
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\n---\n# model\n")
    base, trained = make(), edited()
    base.config._name_or_path = str(tmp_path / "m")
    given: dict[str, Any] = {"edits": edits, "configuration": {"lr": 1e-3}, "scores": {"edit/reliability": 1.0}}
    delta = through_a_file(EditDelta.between(base, trained, **given), tmp_path)
    meta = delta.meta
    assert meta["edits"] == {"hash": edits.hash, "count": 2}
    assert meta["configuration"] == {"lr": 1e-3}
    assert meta["scores"] == {"edit/reliability": 1.0}
    assert meta["base"]["license"] == "mit"
    assert meta["base"]["name"] == "m"
    assert str(tmp_path) not in str(meta)
    assert set(meta["base"]["names"]) == {name for name, _ in base.named_parameters()}
    assert {"torch", "transformers"} <= set(meta["versions"])
    assert EditDelta.between(base, trained, edits=list(edits)).meta["edits"]["hash"] == edits.hash
    assert through_a_file(EditDelta.between(base, trained, license="own"), tmp_path).meta["base"]["license"] == "own"


def test_a_model_in_neither_state_is_refused_and_unchanged(make, edited):
    base, trained = make(), edited()
    delta = EditDelta.between(base, trained)
    with pytest.raises(EditError, match=r"q_proj.weight: the delta cannot be reverted"):
        delta.revert(base)
    with pytest.raises(EditError, match=r"the delta is already applied to this model"):
        delta.apply(trained)
    # The sparse layout does not store this entry, so only the hash of the whole tensor detects it.
    other = make()
    with torch.no_grad():
        other.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 9] += 1e-3
    before = state_of(other)
    for act in (delta.apply, delta.revert, delta.verify):
        with pytest.raises(EditError, match=r"q_proj.weight|down_proj.weight"):
            act(other)
    assert equal_bits(state_of(other), before)
    half = copy.deepcopy(base)
    half.load_state_dict({DOWN: trained.get_parameter(DOWN)}, strict=False)
    with pytest.raises(EditError, match=r"down_proj.weight: the delta is already applied"):
        delta.verify(half)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, r"is bfloat16 \[16, 16\] in the model and float32 \[16, 16\] in the"),
        ({"hidden_size": 24}, r"is float32 \[24, 24\] in the model"),
        ({"num_hidden_layers": 1}, r"the model has no tensor 'model.layers.1.mlp.down_proj.weight'"),
    ],
)
def test_another_model_is_refused(change, message, make, edited):
    delta = EditDelta.between(make(), edited())
    with pytest.raises(EditError, match=message) as error:
        delta.apply(make(**change))
    assert "\n" not in str(error.value)


def test_a_model_with_more_tied_weights_than_the_base_is_refused(make):
    config = {"tie_word_embeddings": False}
    base, trained, tied = make(**config), make(**config), make(tie_word_embeddings=True)
    with torch.no_grad():
        for model in (base, trained):
            model.lm_head.weight.copy_(tied.lm_head.weight)
            model.model.embed_tokens.weight.copy_(tied.lm_head.weight)
        trained.lm_head.weight += 1.0
    delta = EditDelta.between(base, trained)
    with pytest.raises(
        EditError, match=r"ties lm_head.weight to model.embed_tokens.weight, but the base model has two"
    ):
        delta.apply(tied)


def test_a_tied_delta_changes_both_tensors_of_an_untied_model(make):
    base, trained, apart = make(tie_word_embeddings=True), make(tie_word_embeddings=True), make()
    with torch.no_grad():
        trained.lm_head.weight += 1.0
        apart.load_state_dict(base.state_dict())
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    delta = EditDelta.between(base, trained)
    delta.apply(apart)
    assert torch.equal(apart.lm_head.weight, trained.lm_head.weight)
    assert torch.equal(apart.model.embed_tokens.weight, trained.lm_head.weight)
    delta.revert(apart)
    assert torch.equal(apart.model.embed_tokens.weight, base.lm_head.weight)


def test_models_that_cannot_be_compared_are_refused(make, tmp_path):
    for edited, message in [
        (make(num_hidden_layers=1), "only the base model has a tensor"),
        (make(torch.bfloat16), "is torch.float32 .* in the base model and torch.bfloat16"),
        ({"a": 3}, "must contain tensors and nothing else"),
        (tmp_path / "nowhere", "does not exist; give the folder"),
        (tmp_path, "contains neither model.safetensors nor"),
        (7, "expected a module, a state dict .* got int"),
    ]:
        with pytest.raises(EditError, match=message):
            EditDelta.between(make(), edited)


def test_equal_models_give_an_empty_delta(make, tmp_path):
    delta = through_a_file(EditDelta.between(make(), make()), tmp_path)
    assert len(delta) == 0
    assert delta.verify(make(), full=True) == "base"


def test_a_real_checkpoint(factlm, tmp_path):
    """Gradient steps on one matrix, compared in memory and on disk."""
    base = AutoModelForCausalLM.from_pretrained(factlm)
    trained = copy.deepcopy(base)
    name = next(n for n, _ in trained.named_parameters() if "layers.2.mlp.down_proj" in n)
    weight = trained.get_parameter(name)
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    for _ in range(2):
        ids = torch.arange(5, 25).unsqueeze(0)
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = through_a_file(EditDelta.between(factlm, trained), tmp_path)
    assert list(delta.changes) == [name]
    out = delta.apply_to_checkpoint(factlm, tmp_path / "edited")
    assert equal_bits(state_of(AutoModelForCausalLM.from_pretrained(out)), state_of(trained))
    back = delta.revert_checkpoint(out, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (factlm / "model.safetensors").read_bytes()
