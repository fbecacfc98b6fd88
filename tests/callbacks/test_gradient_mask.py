"""Which entries a mask lets change: by score, by neuron, from a file; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kedit_train.callbacks import EditMetrics, GradientMask, ParameterScope, editing
from kedit_train.core.scope.mask_file import save_masks
from kedit_train.data import Edit
from kedit_train.errors import EditError

EDITS = [
    Edit("w1 w2 w3", "w4", rephrases=("w20 w21",)),
    Edit("w5 w6", "w7 w8"),
    Edit("w9 w10 w11 w12", "w13"),
]

TEXTS = ["w30 w31 w32 w33", "w40 w41 w42 w43 w44", "w50 w51", "w20 w21 w22"]

DOWN = "model.layers.1.mlp.down_proj.weight"


def masks(model: Any, words: Any, *callbacks: Any, **given: Any) -> dict[str, Tensor]:
    """What may change, by name."""
    with editing(model, [mask := GradientMask(**given), *callbacks], tokenizer=words) as edit:
        edit.before_step()
        kept, total = (sum(int(f(~held)) for held in mask._held.values()) for f in (torch.sum, torch.numel))
        assert mask.metrics(edit.run)["edit/scope/mask_density"] == pytest.approx(kept / total, rel=1e-12)
        return {name: ~held for name, held in mask._held.items()}


@pytest.mark.parametrize("score", ["fisher", "fisher_ratio", "gradient", "magnitude", "random"])
@pytest.mark.parametrize("density", [0.013, 0.05, 0.5, 1.0])
def test_the_density_of_every_tensor_is_exact(make, words, score, density):
    texts = TEXTS[:3] if score == "fisher_ratio" else None
    found = masks(make(), words, ParameterScope(None, "mlp"), score=score, density=density, edits=EDITS, texts=texts)
    assert len(found) == 6
    for name, mask in found.items():
        assert int(mask.sum()) == round(density * mask.numel()), name


@pytest.mark.parametrize("score", ["fisher", "fisher_ratio", "gradient", "random"])
def test_masks_are_seeded_and_leave_the_random_state_alone(make, words, score):
    model, state = make(), torch.get_rng_state()
    given = {"score": score, "edits": EDITS, "texts": TEXTS[:3] if score == "fisher_ratio" else None, "samples": 2}
    first, again, other = (masks(model, words, ParameterScope(1, "mlp"), seed=s, **given) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_gradient_score_is_the_size_of_the_edits_own_gradient(make, words):
    model = make()
    found = masks(model, words, ParameterScope(1, "down_proj"), score="gradient", density=0.1, edits=EDITS)[DOWN]
    total = torch.zeros_like(model.get_parameter(DOWN))
    for edit in EDITS:
        prompt, ids = (words(t)["input_ids"] for t in (edit.prompt, f"{edit.prompt} {edit.target} </s>"))
        labels = torch.tensor([-100] * len(prompt) + ids[len(prompt) :])[None]
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss * (len(ids) - len(prompt))
        total += torch.autograd.grad(loss, model.get_parameter(DOWN))[0]
    best = total.abs().flatten().topk(51).indices
    assert set(best.tolist()) == set(found.flatten().nonzero().squeeze(-1).tolist())


def test_the_ratio_turns_away_from_what_general_texts_need(make, words):
    model, scope = make(), ParameterScope(None, "embed_tokens")
    given = {"edits": EDITS, "density": 5 / 61, "granularity": "row"}
    # Every token of the first two edits, and none of the third's, so that the rows of those five stand out.
    texts = ["w8 w7 w6 w5 w4 w3 w2 w1 w8 w7 w6 w5 w4 w3 w2 w1"] * 3
    third = torch.tensor([words.convert_tokens_to_ids(f"w{i}") for i in (9, 10, 11, 12, 13)])
    alone = masks(model, words, scope, score="fisher", **given)["model.embed_tokens.weight"][:, 0]
    ratio = masks(model, words, scope, score="fisher_ratio", texts=texts, **given)["model.embed_tokens.weight"][:, 0]
    assert alone.sum() == ratio.sum() == 5
    assert ratio[third].sum() > alone[third].sum()


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_neurons_of_linear_layers_and_of_gpt2s_transposed_ones(make, words, granularity):
    llama = masks(make(), words, ParameterScope(1, "down_proj"), score="fisher", granularity=granularity, density=0.25,
                  edits=EDITS)[DOWN]  # fmt: skip
    rows = llama if granularity == "row" else llama.T
    assert llama.shape == (16, 32)
    assert rows.all(1).sum() == rows.any(1).sum() == len(rows) // 4
    gpt2 = masks(make("gpt2"), words, ParameterScope(1, "mlp.c_fc"), score="random", granularity=granularity,
                 density=0.25)  # fmt: skip
    weight, bias = gpt2["transformer.h.1.mlp.c_fc.weight"], gpt2["transformer.h.1.mlp.c_fc.bias"]
    assert weight.shape == (16, 64)
    rows = weight.T if granularity == "row" else weight
    assert rows.all(1).sum() == rows.any(1).sum() == len(rows) // 4
    assert torch.equal(bias, rows.all(1) if granularity == "row" else torch.zeros(64, dtype=torch.bool))


@pytest.mark.parametrize("score", ["fisher", "gradient", "fisher_ratio"])
def test_other_models_have_no_answers_to_score(score):
    texts = TEXTS if score == "fisher_ratio" else None
    with pytest.raises(EditError) as error:
        editing(nn.GRU(2, 4), [GradientMask(score, texts=texts)]).__enter__()
    assert str(error.value) == (
        f"GradientMask: score='{score}' asks a causal language model for answers, and GRU has no "
        "language-model head; use score='magnitude', 'random' or mask="
    )


def test_a_mask_survives_its_file(make, words, tmp_path):
    model, path, scope = make(), tmp_path / "mask.safetensors", ParameterScope(1, "mlp")
    written = masks(model, words, scope, edits=EDITS, save_to=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.safetensors"]
    read = masks(make(), words, scope, mask=path)
    assert written.keys() == read.keys() == load_file(path).keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    save_file(read, path)
    assert all(torch.equal(read[n], m) for n, m in masks(make(), words, scope, mask=str(path)).items())


def whole(model: Any) -> dict[str, Tensor]:
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if "layers.1.mlp" in n}


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "shape": (lambda m: m | {DOWN: m[DOWN].T.contiguous()}, "{path}: " + DOWN + " is [32, 16] there and [16, 32] in"),
    "missing": (lambda m: {n: v for n, v in m.items() if n != DOWN}, "{path}: " + DOWN + " has no mask in it"),
    "unknown": (lambda m: m | {"lm_head.weight": m[DOWN].clone()}, "{path}: lm_head.weight is not in the scope"),
    "numbers": (lambda m: m | {DOWN: m[DOWN].float()}, "{path}: " + DOWN + " holds torch.float32; a mask holds bools"),
    "nothing": (lambda m: {n: ~v for n, v in m.items()}, "the mask holds all 1536 entries of the scope"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_mask_of_something_else_is_refused(make, words, tmp_path, kind):
    spoil, message = SPOILED[kind]
    model, path = make(), tmp_path / "mask.safetensors"
    save_file(spoil(whole(model)), path)
    with pytest.raises(EditError) as error:
        masks(model, words, ParameterScope(1, "mlp"), mask=path)
    assert str(error.value).startswith("GradientMask: " + message.format(path=path))
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_refused_before_training(make, tmp_path):
    model, path = make(), tmp_path / "mask.safetensors"
    save_masks(path, whole(model))
    content = path.read_bytes()
    spoiled = [
        ("is not as it was written", content[:-1] + bytes([1 - content[-1]])),
        ("holds bytes that are neither 0 nor 1", content[:-1] + b"\x07"),
        *(("is no safetensors file, or a damaged one", content[:end]) for end in (0, 7, 90, -5)),
    ]
    for message, data in spoiled:
        path.write_bytes(data)
        with pytest.raises(EditError, match=message) as error:
            editing(model, [GradientMask(mask=path)]).__enter__()
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(EditError, match=r"^GradientMask: no mask file '.*'; give the path that save_to= wrote$"):
        editing(model, [GradientMask(mask=path)]).__enter__()


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = save_masks(tmp_path / "mask.safetensors", {"a": torch.tensor([True, False])})
    content = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        save_masks(path, {"a": torch.tensor([True, True])})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_only_prompts_and_targets_of_edits_are_read(make, words):
    model, scope = make(), ParameterScope(1, "mlp")
    rich = [Edit("w1 w2 w3", "w4", subject="w40", old_target="w41", aliases=("w42",), rephrases=("w43 w44",))]
    plain = [Edit("w1 w2 w3", "w4")]
    found = [masks(model, words, scope, edits=edits) for edits in (rich, plain)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.warns(UserWarning, match="GradientMask: 1 of 4 texts contain a prompt that the edits are scored on"):
        probes_out = masks(model, words, scope, score="fisher_ratio", edits=EDITS, texts=TEXTS)
    clean = masks(model, words, scope, score="fisher_ratio", edits=EDITS, texts=TEXTS[:3])
    assert all(torch.equal(probes_out[name], clean[name]) for name in clean)


def test_the_edits_may_be_those_of_another_callback_in_any_order(make, words):
    model, scope = make(), ParameterScope(1, "mlp")
    metrics = EditMetrics(EDITS, show=False, max_new_tokens=2)
    want = masks(model, words, scope, edits=EDITS)
    for direction in (1, -1):
        found = masks(model, words, *[metrics, scope][::direction])
        assert all(torch.equal(found[name], want[name]) for name in want)
    with (
        editing(model, [GradientMask()], tokenizer=words) as edit,
        pytest.raises(
            EditError, match=r"^GradientMask: score='gradient' needs the edits, and this plain loop run holds"
        ),
    ):
        edit.before_step()


def test_rows_of_stacked_experts_are_refused(words):
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(EditError, match=r"^experts has shape \[2, 3, 4\], of which no dimension is known to be a row"):
        masks(model, words, score="random", granularity="row")
    assert masks(model, words, score="random", density=0.5)["experts"].sum() == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": "size"}, "score='size' is out of bounds"),
        ({"density": 0.0}, "density=0.0 is out of bounds"),
        ({"density": float("nan")}, "density=nan is out of bounds"),
        ({"granularity": "layer"}, "granularity='layer' is out of bounds"),
        ({"samples": 0}, "samples=0 is out of bounds"),
        ({"max_length": 1}, "max_length=1 is out of bounds"),
        ({"score": "fisher_ratio"}, "score='fisher_ratio' needs texts="),
        ({"texts": ["a"]}, "score='gradient' does not read texts="),
        ({"mask": "m.safetensors", "density": 0.1}, "mask= is the mask; leave out"),
        ({"mask": "m.safetensors", "save_to": "x"}, "mask= is the mask; leave out"),
    ],
)
def test_arguments_that_make_no_sense(given, message):
    with pytest.raises(EditError) as error:
        GradientMask(**given)
    assert str(error.value).startswith(f"GradientMask: {message}")
