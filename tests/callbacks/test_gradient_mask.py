"""GradientMask chooses entries by score, by neuron and from a file, and reports invalid arguments and files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kedit_train.callbacks import EditMetrics, GradientMask, MaskScore, ParameterScope, editing
from kedit_train.core.scope.mask_file import save_masks
from kedit_train.data import Edit
from kedit_train.errors import EditError
from kedit_train.evaluation.options import EvaluationOptions

EDITS = [
    Edit("w1 w2 w3", "w4", rephrases=("w20 w21",)),
    Edit("w5 w6", "w7 w8"),
    Edit("w9 w10 w11 w12", "w13"),
]

TEXTS = ["w30 w31 w32 w33", "w40 w41 w42 w43 w44", "w50 w51", "w20 w21 w22"]

DOWN = "model.layers.1.mlp.down_proj.weight"


def masks(model: Any, words: Any, *callbacks: Any, **arguments: Any) -> dict[str, Tensor]:
    """Return a mask per parameter, True where the entry may change."""
    with editing(model, [mask := GradientMask(**arguments), *callbacks], tokenizer=words) as edit:
        edit.before_step()
        trained, total = (sum(int(f(~frozen)) for frozen in mask._frozen.values()) for f in (torch.sum, torch.numel))
        assert mask.metrics(edit.run)["edit/scope/mask_density"] == pytest.approx(trained / total, rel=1e-12)
        return {name: ~frozen for name, frozen in mask._frozen.items()}


@pytest.mark.parametrize("score", ["fisher", "fisher_ratio", "gradient", "magnitude", "random"])
@pytest.mark.parametrize("density", [0.013, 0.05, 0.5, 1.0])
def test_the_density_of_every_tensor_is_exact(make, words, score, density):
    texts = TEXTS[:3] if score == "fisher_ratio" else None
    chosen = masks(make(), words, ParameterScope(modules="mlp"), score=score, density=density, edits=EDITS, texts=texts)
    assert len(chosen) == 6
    for name, mask in chosen.items():
        assert int(mask.sum()) == round(density * mask.numel()), name


@pytest.mark.parametrize("score", ["fisher", "fisher_ratio", "gradient", "random"])
def test_masks_depend_on_their_seed_and_not_on_the_global_random_state(make, words, score):
    model, state = make(), torch.get_rng_state()
    scope, texts = ParameterScope(1, modules="mlp"), TEXTS[:3] if score == "fisher_ratio" else None
    scores = [MaskScore(score, limit=2, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (masks(model, words, scope, score=s, edits=EDITS, texts=texts) for s in scores)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_gradient_score_is_the_absolute_gradient_of_the_targets(make, words):
    model = make()
    chosen = masks(model, words, ParameterScope(1, modules="down_proj"), score="gradient", density=0.1, edits=EDITS)[
        DOWN
    ]
    total = torch.zeros_like(model.get_parameter(DOWN))
    for edit in EDITS:
        prompt, ids = (words(t)["input_ids"] for t in (edit.prompt, f"{edit.prompt} {edit.target} </s>"))
        labels = torch.tensor([-100] * len(prompt) + ids[len(prompt) :])[None]
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss * (len(ids) - len(prompt))
        total += torch.autograd.grad(loss, model.get_parameter(DOWN))[0]
    best = total.abs().flatten().topk(51).indices
    assert set(best.tolist()) == set(chosen.flatten().nonzero().squeeze(-1).tolist())


def test_the_ratio_avoids_entries_that_texts_need(make, words):
    model, scope = make(), ParameterScope(modules="embed_tokens")
    arguments = {"edits": EDITS, "density": 5 / 61, "granularity": "row"}
    # The texts hold every token of the first two edits and none of the third, so the five rows of the third stand out.
    texts = ["w8 w7 w6 w5 w4 w3 w2 w1 w8 w7 w6 w5 w4 w3 w2 w1"] * 3
    third = torch.tensor([words.convert_tokens_to_ids(f"w{i}") for i in (9, 10, 11, 12, 13)])
    alone = masks(model, words, scope, score="fisher", **arguments)["model.embed_tokens.weight"][:, 0]
    ratio = masks(model, words, scope, score="fisher_ratio", texts=texts, **arguments)["model.embed_tokens.weight"][
        :, 0
    ]
    assert alone.sum() == ratio.sum() == 5
    assert ratio[third].sum() > alone[third].sum()


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_neurons_of_linear_layers_and_of_transposed_gpt2_layers(make, words, granularity):
    share = {"granularity": granularity, "density": 0.25}
    llama = masks(make(), words, ParameterScope(1, modules="down_proj"), score="fisher", edits=EDITS, **share)[DOWN]
    rows = llama if granularity == "row" else llama.T
    assert llama.shape == (16, 32)
    assert rows.all(1).sum() == rows.any(1).sum() == len(rows) // 4
    gpt2 = masks(make("gpt2"), words, ParameterScope(1, modules="mlp.c_fc"), score="random", **share)
    weight, bias = gpt2["transformer.h.1.mlp.c_fc.weight"], gpt2["transformer.h.1.mlp.c_fc.bias"]
    assert weight.shape == (16, 64)
    rows = weight.T if granularity == "row" else weight
    assert rows.all(1).sum() == rows.any(1).sum() == len(rows) // 4
    assert torch.equal(bias, rows.all(1) if granularity == "row" else torch.zeros(64, dtype=torch.bool))


@pytest.mark.parametrize("score", ["fisher", "gradient", "fisher_ratio"])
def test_scores_from_edits_need_a_language_model(score):
    texts = TEXTS if score == "fisher_ratio" else None
    with pytest.raises(EditError) as error:
        editing(nn.GRU(2, 4), [GradientMask(score, texts=texts)]).__enter__()
    assert str(error.value) == (
        f"GradientMask: score='{score}' needs a causal language model, and GRU has no language-model head; "
        'use score="magnitude", score="random" or mask_path.'
    )


def test_a_mask_is_the_same_after_saving_and_loading(make, words, tmp_path):
    model, path, scope = make(), tmp_path / "mask.safetensors", ParameterScope(1, modules="mlp")
    copied = copy.deepcopy(model)
    written = masks(model, words, scope, edits=EDITS, save_path=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.safetensors"]
    read = masks(copied, words, scope, mask_path=path)
    assert written.keys() == read.keys() == load_file(path).keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    save_file(read, path)
    assert all(torch.equal(read[n], m) for n, m in masks(make(), words, scope, mask_path=str(path)).items())


def test_a_mask_of_another_model_with_equal_shapes_gives_a_warning(make, words, tmp_path):
    """The model is identified by weights that a run with this mask does not change."""
    model, path, scope = make(), tmp_path / "mask.safetensors", ParameterScope(1, modules="mlp")
    masks(model, words, scope, score="random", save_path=path)
    with torch.no_grad():
        model.get_parameter(DOWN).add_(1)
    masks(model, words, scope, mask_path=path)
    masks(model.to(torch.bfloat16).to(torch.float32), words, scope, mask_path=path)
    message = (
        r"^GradientMask: .*mask.safetensors was made for another model .*; use the model that the mask was made for"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        masks(make(), words, scope, mask_path=path)
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)


def full_mask(model: Any) -> dict[str, Tensor]:
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if "layers.1.mlp" in n}


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "shape": (
        lambda m: m | {DOWN: m[DOWN].T.contiguous()},
        "{path}: the mask of " + repr(DOWN) + " must have the parameter's shape [16, 32], got [32, 16]",
    ),
    "missing": (
        lambda m: {n: v for n, v in m.items() if n != DOWN},
        "{path} contains no mask of the parameter " + repr(DOWN),
    ),
    "unknown": (
        lambda m: m | {"lm_head.weight": m[DOWN].clone()},
        "{path} contains a mask of 'lm_head.weight', which is not in the",
    ),
    "numbers": (
        lambda m: m | {DOWN: m[DOWN].float()},
        "{path}: the mask of " + repr(DOWN) + " must contain bools (True: the entry may change), got torch.float32;",
    ),
    "nothing": (lambda m: {n: ~v for n, v in m.items()}, "the mask freezes all 1536 entries of the scope"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mask_that_does_not_fit_is_an_error(make, words, tmp_path, kind):
    change, message = WRONG[kind]
    model, path = make(), tmp_path / "mask.safetensors"
    save_file(change(full_mask(model)), path)
    with pytest.raises(EditError) as error:
        masks(model, words, ParameterScope(1, modules="mlp"), mask_path=path)
    assert str(error.value).startswith("GradientMask: " + message.format(path=path))
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_an_error_before_training(make, tmp_path):
    model, path = make(), tmp_path / "mask.safetensors"
    save_masks(path, full_mask(model))
    content = path.read_bytes()
    save_file(full_mask(model), path)
    unsigned = path.read_bytes()
    damaged = [
        ("was changed after it was written", content[:-1] + bytes([1 - content[-1]])),
        ("was changed after it was written", content[:-1] + b"\x07"),
        ("must contain bools .* got bytes other than 0 and 1", unsigned[:-1] + b"\x07"),
        *(("safetensors file|damaged", content[:end]) for end in (0, 7, 90, -5)),
    ]
    for message, data in damaged:
        path.write_bytes(data)
        with pytest.raises(EditError, match=message) as error:
            editing(model, [GradientMask(mask_path=path)]).__enter__()
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(EditError, match=r"^GradientMask: file '.*' does not exist; check the path.$"):
        editing(model, [GradientMask(mask_path=path)]).__enter__()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_masks(tmp_path / "mask.safetensors", {"a": torch.tensor([True, False])})
    content = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(EditError, match=r"mask.safetensors cannot be written \(no space left\); free disk space"):
        save_masks(path, {"a": torch.tensor([True, True])})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_only_prompts_and_targets_are_used(make, words):
    model, scope = make(), ParameterScope(1, modules="mlp")
    rich = [Edit("w1 w2 w3", "w4", subject="w40", old_target="w41", aliases=("w42",), rephrases=("w43 w44",))]
    plain = [Edit("w1 w2 w3", "w4")]
    chosen = [masks(model, words, scope, edits=edits) for edits in (rich, plain)]
    assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in chosen[0])
    with pytest.warns(UserWarning, match="GradientMask: 1 of 4 texts contain an evaluation prompt of the edits"):
        without_leaks = masks(model, words, scope, score="fisher_ratio", edits=EDITS, texts=TEXTS)
    clean = masks(model, words, scope, score="fisher_ratio", edits=EDITS, texts=TEXTS[:3])
    assert all(torch.equal(without_leaks[name], clean[name]) for name in clean)


def test_edits_of_another_callback_are_used_in_any_order_of_the_list(make, words):
    model, scope = make(), ParameterScope(1, modules="mlp")
    metrics = EditMetrics(EDITS, show=False, evaluation=EvaluationOptions(max_new_tokens=2))
    expected = masks(model, words, scope, edits=EDITS)
    for direction in (1, -1):
        chosen = masks(model, words, *[metrics, scope][::direction])
        assert all(torch.equal(chosen[name], expected[name]) for name in expected)
    with (
        editing(model, [GradientMask()], tokenizer=words) as edit,
        pytest.raises(
            EditError, match=r"^GradientMask: score='gradient' needs edits, and this run .plain loop. has no edits"
        ),
    ):
        edit.before_step()


def test_rows_of_stacked_experts_are_an_error(words):
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(
        EditError, match=r"^GradientMask: the parameter 'experts' must be a matrix .* got the shape \[2, 3, 4\]; use"
    ):
        masks(model, words, score="random", granularity="row")
    assert masks(model, words, score="random", density=0.5)["experts"].sum() == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"score": "size"},
            'score must be "gradient", "fisher", "fisher_ratio", "magnitude" or "random", got \'size\'.',
        ),
        ({"density": 0.0}, "density must be in (0, 1], got 0.0."),
        ({"density": float("nan")}, "density must be in (0, 1], got nan."),
        ({"granularity": "layer"}, 'granularity must be "element", "row" or "column", got \'layer\'.'),
        (
            {"score": "fisher_ratio"},
            "texts must be given if score='fisher_ratio'; set texts if and only if score='fisher_ratio'",
        ),
        ({"texts": ["a"]}, "texts must be None if score='gradient'; set texts if and only if score='fisher_ratio'"),
        ({"mask_path": "m.safetensors", "density": 0.1}, "mask_path must not be combined"),
        ({"mask_path": "m.safetensors", "save_path": "x"}, "mask_path must not be combined"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(EditError) as error:
        GradientMask(**arguments)
    assert str(error.value).startswith(f"GradientMask: {message}")


def test_a_score_is_a_name_a_mask_score_or_a_mapping() -> None:
    assert MaskScore.of("random") == MaskScore("random", limit=256, seed=0)
    assert MaskScore.of({"name": "fisher", "limit": None}) == MaskScore("fisher", limit=None)
    assert MaskScore.of(MaskScore("fisher", seed=2)).seed == 2
    with pytest.raises(EditError, match=r"^MaskScore: limit must be an integer >= 1, or None, got 0\.$"):
        MaskScore("gradient", limit=0)
    with pytest.raises(EditError, match=r"^MaskScore: unknown argument 'samples'; use only name, limit, seed\.$"):
        MaskScore.of({"samples": 4})
