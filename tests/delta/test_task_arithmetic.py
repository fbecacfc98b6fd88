"""Sums, scales and merges of deltas equal the written-out formulas, and apply and revert exactly."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from delta.tiny import DOWN, equal_bits, state_of
from installed import needs
from torch import Tensor

from kedit_train import EditDelta, EditError
from kedit_train.delta import TaskVector, merge, sparsify, sweep


def delta_of(base: dict[str, Tensor], changes: dict[str, Tensor]) -> EditDelta:
    edited = {name: value.clone() for name, value in base.items()}
    for name, change in changes.items():
        edited[name] = (edited[name].float() + change).to(edited[name].dtype)
    return EditDelta.between(base, edited)


@pytest.fixture
def base() -> dict[str, Tensor]:
    return {"a": torch.randn(12, 10), "b": torch.randn(40).bfloat16(), "c": torch.randn(6, 8).half()}


def scattered(shape: tuple[int, ...], share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)


@pytest.fixture
def three(base) -> list[EditDelta]:
    """Return three deltas. They store some tensors completely, and only single entries of all other tensors."""
    return [
        delta_of(base, {"a": scattered((12, 10), 0.3, 1), "b": scattered((40,), 0.2, 2)}),
        delta_of(base, {"a": scattered((12, 10), 0.35, 3), "c": scattered((6, 8), 1.0, 4)}),
        delta_of(base, {"a": scattered((12, 10), 1.0, 5)}),
    ]


def expected(base: dict[str, Tensor], combine) -> dict[str, Tensor]:
    return {name: (value.float() + combine(name)).to(value.dtype) for name, value in base.items()}


def difference(delta: EditDelta, name: str, base: dict[str, Tensor]) -> Tensor:
    return delta.difference(name) if name in delta.changes else torch.zeros(base[name].shape)


def test_sums_and_scales_equal_the_formulas(base, three, tmp_path):
    a, b, c = three

    def of(delta: EditDelta):
        return lambda name: difference(delta, name, base)

    cases = {
        "a + b": (a + b, lambda n: of(a)(n) + of(b)(n)),
        "-a": (-a, lambda n: -of(a)(n)),
        "0.5 * a": (0.5 * a, lambda n: 0.5 * of(a)(n)),
        "a - b": (a - b, lambda n: of(a)(n) - of(b)(n)),
        "a + b * 2 - c": (a + b * 2 - c, lambda n: of(a)(n) + 2 * of(b)(n) - of(c)(n)),
        "c + (b - a)": (c + (b - a), lambda n: of(c)(n) + (of(b)(n) - of(a)(n))),
        "a + a": (a + a.vector(), lambda n: 2 * of(a)(n)),
    }
    for case, (vector, combine) in cases.items():
        assert isinstance(vector, TaskVector)
        # Through a file, so that the base is known from the deltas alone.
        delta = EditDelta.load(vector.delta().save(tmp_path / "made.safetensors"))
        state = {name: value.clone() for name, value in base.items()}
        delta.apply(state)
        for name, want in expected(base, combine).items():
            torch.testing.assert_close(state[name], want, rtol=1e-6, atol=1e-6, msg=f"{case}: {name}")
        assert equal_bits(delta.revert(state), base)


def test_unknown_values_of_the_base_are_never_stored(base):
    """Two sparse deltas cover three quarters of a tensor. A dense layout would be smaller, but wrong in the rest."""
    a, b = (delta_of(base, {"a": scattered((12, 10), 0.5, seed)}) for seed in (11, 12))
    assert {a.changes["a"].layout, b.changes["a"].layout} == {"entries"}
    made = (a + b).delta()
    assert made.changes["a"].layout == "entries"
    state = {name: value.clone() for name, value in base.items()}
    assert equal_bits(made.revert(made.apply(state)), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_times_a_delta_is_exact_in_half_precision_and_rounded_in_fp32(dtype, make, edited):
    model, trained = make(dtype), edited(dtype)
    again = (1.0 * EditDelta.between(model, trained)).apply(model)
    for name, value in trained.state_dict().items():
        if dtype == torch.float32:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-8)
        else:
            # The difference of two half-precision numbers of similar size is exact in fp32.
            assert torch.equal(model.state_dict()[name], value), name
    assert equal_bits(state_of(again.revert(model)), state_of(make(dtype)))


def test_many_small_steps_are_rounded_once():
    """In bf16 a hundredth of an update rounds to nothing, but the sum of a hundred of them is the update."""
    base = {"w": torch.ones(8).bfloat16()}
    delta = delta_of(base, {"w": torch.full((8,), 0.0078125)})
    small = 0.01 * delta
    assert len(small.delta()) == 0
    total = small
    for _ in range(99):
        total = total + small
    assert torch.equal(total.delta().changes["w"].after, delta.changes["w"].after)


@needs("torch", "2.13")  # torch 2.6 cannot select entries of float8 tensors
def test_arithmetic_works_in_float8():
    base = torch.tensor([0.5, 1.0, 448.0]).to(torch.float8_e4m3fn)
    edited = torch.tensor([0.5, 2.0, 384.0]).to(torch.float8_e4m3fn)
    delta = EditDelta.between({"w": base}, {"w": edited})
    assert (0.5 * delta).apply({"w": base.clone()}).changes["w"].after.float().tolist() == [0.5, 1.5, 416.0]


def test_signed_zeros_are_preserved():
    base = {"w": torch.tensor([-0.0, 0.0, 1.0])}
    made = (0.5 * delta_of(base, {"w": torch.tensor([0.0, 0.0, 1.0])})).delta()
    state = {"w": base["w"].clone()}
    made.apply(state)
    assert state["w"].signbit().tolist() == [True, False, False]


def test_linear_ties_and_dare_equal_the_formulas_of_the_papers(base, three):
    a, b, c = (delta.difference("a") for delta in three)
    weights = [1.0, 0.5, 2.0]
    linear = merge(three, weights=weights)
    torch.testing.assert_close(linear.differences["a"], a + 0.5 * b + 2 * c)
    torch.testing.assert_close(linear.differences["c"], 0.5 * three[1].difference("c"))

    trimmed = []
    for values in (a, b, c):
        flat = values.reshape(-1)
        kept = sorted(range(len(flat)), key=lambda i: -abs(float(flat[i])))[: int(0.4 * len(flat))]
        trimmed.append([float(flat[i]) if i in kept else 0.0 for i in range(len(flat))])
    want = []
    for entry in zip(*trimmed, strict=True):
        sign = 1.0 if sum(entry) >= 0 else -1.0
        agreeing = [w * v for w, v in zip(weights, entry, strict=True) if v * sign > 0]
        want.append(sum(agreeing) / max(1, len(agreeing)))
    ties = merge(three, weights=weights, method="ties", density=0.4)
    torch.testing.assert_close(ties.differences["a"].reshape(-1), torch.tensor(want), rtol=1e-5, atol=1e-6)

    dare = merge(three[:1], method="dare", density=0.5, seed=3).differences["a"]
    kept = dare != 0
    torch.testing.assert_close(dare[kept], 2 * a[kept])
    assert 0.2 < kept.sum() / (a != 0).sum() < 0.8
    assert torch.equal(dare, merge(three[:1], method="dare", density=0.5, seed=3).differences["a"])
    assert not torch.equal(dare, merge(three[:1], method="dare", density=0.5, seed=4).differences["a"])
    torch.testing.assert_close(merge(three[:1], method="ties", density=1.0).differences["a"], a)


def test_only_ties_and_dare_need_peft(three, monkeypatch):
    from peft.utils.merge_utils import task_arithmetic

    parts = [delta.difference("a") for delta in three]
    theirs = task_arithmetic(parts, torch.tensor([1.0, -0.5, 2.0]))
    # Python treats None in sys.modules as a module that is not installed.
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    torch.testing.assert_close(merge(three, weights=[1.0, -0.5, 2.0]).differences["a"], theirs)
    for method in ("ties", "dare"):
        with pytest.raises(EditError, match="peft is not installed; install it with pip install peft"):
            merge(three, method=method)


def test_dare_does_not_change_the_random_state(three):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    merge(three, method="dare")
    assert torch.equal(torch.rand(3), want)


def test_sparsify_keeps_the_largest_relative_changes(base):
    base["a"][0, 0] = 0.0
    delta = delta_of(base, {"a": scattered((12, 10), 1.0, 6)})
    change = delta.difference("a")
    kept = sparsify(delta, density=0.25).differences["a"]
    ratio = {
        (i, j): abs(float(change[i, j])) / abs(float(base["a"][i, j]) or 1e-30) for i in range(12) for j in range(10)
    }
    chosen = sorted(ratio, key=lambda place: -ratio[place])[:30]
    assert {(int(i), int(j)) for i, j in kept.nonzero()} == set(chosen)
    assert all(kept[place] == change[place] for place in chosen)
    assert torch.equal(sparsify(delta, density=1.0).differences["a"], change)


def test_cosines(base):
    one = torch.zeros(12, 10)
    one[0] = 1.0
    other = torch.zeros(12, 10)
    other[1] = 1.0
    zeros = {"a": torch.zeros(12, 10), "b": base["b"], "c": base["c"]}
    x, y, both = delta_of(zeros, {"a": one}), delta_of(zeros, {"a": other}), delta_of(zeros, {"a": one + other})
    minus = delta_of(zeros, {"a": -3 * one}).vector()
    apart = delta_of(zeros, {"c": torch.ones(6, 8)})
    cosine = x.vector().cosine
    assert cosine(x) == pytest.approx(1.0)
    assert cosine(y) == cosine(apart) == 0.0
    assert cosine(both) == pytest.approx(math.sqrt(0.5))
    assert cosine(minus) == pytest.approx(-1.0)
    assert cosine(0.0 * x) == 0.0


def test_different_bases_are_refused(base, three):
    moved = {name: value.clone() for name, value in base.items()}
    moved["c"][0, 0] += 1
    other = delta_of(moved, {"a": torch.ones(12, 10)})
    for act in (
        lambda: three[0] + other,
        lambda: three[0] - other,
        lambda: merge([*three, other]),
        lambda: three[0].vector().cosine(other),
        lambda: other + (three[1] - three[0]),
    ):
        with pytest.raises(EditError, match="the deltas belong to different base models"):
            act()


def test_wrong_arguments_are_refused(base, three):
    for act, message in [
        (lambda: three[0] + 1, "expected an EditDelta or a TaskVector, got int"),
        (lambda: three[0] * math.nan, "factor of a delta must be a finite number, got nan"),
        (lambda: three[0] * "2", "factor of a delta must be a finite number, got '2'"),
        (lambda: merge([]), "merge: expected at least one delta, and one weight per delta, got 0 deltas and 0 weights"),
        (lambda: merge(three, weights=[1.0]), "got 3 deltas and 1 weights"),
        (lambda: merge(three, method="mean"), 'merge: method must be "linear", "ties" or "dare", got .mean.'),  # type: ignore[arg-type]
        (lambda: merge(three, method="dare", density=0.0), r"merge: density must be in \(0, 1\], got 0.0"),
        (lambda: sparsify(three[0], density=0.0), r"sparsify: density must be in \(0, 1\], got 0.0"),
        (lambda: (three[1] * 1e9).delta(), "tensor c must have finite values in torch.float16"),
    ]:
        with pytest.raises(EditError, match=message):
            act()


def test_a_sweep_scores_the_base_picks_by_its_rule_and_restores_the_model(make, edited):
    model = make()
    delta = EditDelta.between(model, edited())
    full = float(delta.difference(DOWN).norm())
    start = model.get_parameter(DOWN).detach().clone()

    def score(current):
        moved = float((current.get_parameter(DOWN).detach() - start).norm()) / full
        return {"edit/reliability": min(1.0, round(moved, 3) * 2), "edit/locality": 1.0 - 0.1 * round(moved, 3)}

    found = sweep(model, delta, score, coefficients=[0.25, 1.0, 0.5, 0.4, 0.0])
    assert equal_bits(state_of(model), state_of(make()))
    assert [point.coefficient for point in found.points] == [0.0, 0.25, 0.4, 0.5, 1.0]
    assert [point.reliability for point in found.points] == pytest.approx([0.0, 0.5, 0.8, 1.0, 1.0])
    # Both 0.5 and 1.0 are fully reliable; 0.5 keeps 0.95 of the locality and 1.0 only 0.9.
    assert found.best.coefficient == 0.5
    found.delta.apply(model)
    assert score(model)["edit/reliability"] == pytest.approx(1.0)
    found.delta.revert(model)
    with pytest.raises(EditError, match=r"keeps a locality of at least 0.999 \(the highest is 0.975 with coefficient"):
        sweep(model, delta, score, coefficients=[0.25, 1.0], keep_locality=0.999)
    with pytest.raises(EditError, match="sweep: the score of coefficient 0 must contain a finite 'locality', got nan"):
        sweep(model, delta, lambda current: {"reliability": 1.0}, coefficients=[1.0])
    with pytest.raises(EditError, match="sweep: coefficients must be finite and contain a number other than 0"):
        sweep(model, delta, score, coefficients=[0.5, float("nan")])
    assert equal_bits(state_of(model), state_of(make()))


@pytest.mark.parametrize("after", [0.3, 0.5])
def test_a_sweep_picks_nothing_that_is_not_more_reliable_than_the_base(make, edited, after: float):
    """A coefficient that keeps the locality, but is as reliable as the base model or less, is not an edit."""
    model = make()
    delta = EditDelta.between(model, edited())
    scores = iter([0.5, after, 0.5])
    message = r"sweep: none of the coefficients with enough locality .* than the base model \(0.500\)"
    with pytest.raises(EditError, match=message):
        sweep(model, delta, lambda current: {"reliability": next(scores), "locality": 1.0}, coefficients=[-1.0, 0.5])
    assert equal_bits(state_of(model), state_of(make()))
