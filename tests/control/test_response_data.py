"""ResponseDataModule: states and records of a run, and the errors that come before the responses are sampled."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from control.response_runs import IGNORED, SHORT, data_module, trainer
from lightning.pytorch.callbacks import EarlyStopping

from kedit_train import world
from kedit_train.control import (
    ControlMetrics,
    FactReward,
    PatternReward,
    SamplingOptions,
    ShortAnswer,
    ValueModel,
    ValueModule,
)
from kedit_train.control.control_metrics import measure_control
from kedit_train.control.responses import sample_responses
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.batching import DivergedError
from kedit_train.evaluation.asking.generate import generate_answers

pytestmark = IGNORED
LONG = "word " * 3000


def test_a_second_fit_computes_the_states_of_its_own_model(tmp_path: Path) -> None:
    data = data_module(cache_dir=str(tmp_path))
    first, again, other, layer = (ValueModule(width=8, layers=layers) for layers in (["head"], ["head"], ["head"], [1]))
    with torch.no_grad():
        for parameter in other.language_model.parameters():
            parameter.mul_(1.1)
    means: list[Any] = []
    for module in (first, again, other, layer):
        trainer().fit(module, data)
        means += [network.mean for network in module.value.networks.values()]
    assert means[0].any()
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[0], means[2], rtol=1e-2)
    assert not torch.allclose(means[0], means[3], rtol=1e-2)


def test_a_value_function_is_validated_without_a_fit(tmp_path: Path) -> None:
    module = ValueModule(width=8)
    mean = module.value.networks["head"].mean
    (found,) = trainer().validate(module, data_module(), verbose=False)
    assert found["value/validation_error"] > 0
    assert not mean.any()  # type: ignore[operator]


def test_at_least_one_prompt_is_held_out() -> None:
    data = data_module(validation=0.01)
    trainer().fit(ValueModule(width=8), data)
    assert len(data.validation_indices) == SHORT.samples
    data = data_module(validation=0.0)
    trainer().fit(ValueModule(width=8), data)
    assert not data.validation_indices


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("options", [{"prompts": ["The", "The"]}, {"validation": 0.0}])
def test_a_monitored_error_without_held_out_prompts_is_an_error(options: dict[str, Any]) -> None:
    stop = EarlyStopping("value/validation_error")
    message = r"^ResponseDataModule: EarlyStopping monitors value/validation_error, but no prompt is held out; give at "
    with pytest.raises(EditError, match=message):
        trainer(callbacks=[stop]).fit(ValueModule(width=8), data_module(**options))


def test_a_single_prompt_is_trained_with_a_warning() -> None:
    data = data_module(prompts=["The", "The"])
    with pytest.warns(UserWarning, match="no prompt is held out, because all prompts are the same"):
        trainer().fit(ValueModule(width=8), data)
    assert not data.validation_indices
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*held out")
        trainer().fit(ValueModule(width=8), data_module(prompts=["The"], validation=0.0))


def needs_answers(prompts: Any, completions: Any, answers: Any) -> list[float]:
    return [float(a == b) for a, b in zip(completions, answers, strict=True)]


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("options", "callbacks", "message"),
    [
        ({"prompts": ["The", LONG]}, [], "ResponseDataModule: the prompt 'word word"),
        ({"reward": needs_answers}, [], "ResponseDataModule: reward must be a function reward(prompts, completions)"),
        (
            {"reward": FactReward(world.edits(1))},
            [],
            "FactReward: the edits must contain 'The' as a prompt, a rephrase",
        ),
        ({"cache_dir": os.devnull + "/states"}, [], "because /dev/null is not a folder; change the path."),
        (
            {},
            [ControlMetrics(["The"], step_size=1)],
            "ControlMetrics: prompts must not contain a prompt of the ResponseDataModule, got 'The'",
        ),
        (
            {},
            [ControlMetrics(["A"], step_size=1, layers=[0])],
            "ControlMetrics: layers must be among the layers of the value function (head), got 0",
        ),
        ({}, [ControlMetrics([LONG], step_size=1)], "ControlMetrics: the prompt 'word word"),
        (
            {"prompts": [world.edits(1)[0].prompt], "reward": FactReward(world.edits(1))},
            [ControlMetrics(["A"], step_size=1)],
            "FactReward: the edits must contain 'A' as a prompt, a rephrase",
        ),
    ],
)
def test_errors_come_before_the_sampling_in_one_line(options: Any, callbacks: list[Any], message: str) -> None:
    with pytest.raises(EditError) as error:
        trainer(callbacks=callbacks).fit(ValueModule(width=8), data_module(**options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 250


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_value_function_in_half_precision_is_refused(precision: Any) -> None:
    with pytest.raises(EditError, match=f"precision of the trainer must be one of 32-true.*, got {precision}; use"):
        trainer(precision=precision).fit(ValueModule(width=8), data_module())


def test_a_value_is_computed_in_fp32_in_mixed_precision() -> None:
    value, hidden = ValueModel(["head"], hidden_size=4, width=8), torch.randn(3, 4)
    expected = value.at("head", hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = value.at("head", hidden)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_model_with_logits_or_states_that_are_not_finite_is_refused() -> None:
    def broken() -> ValueModule:
        module = ValueModule(width=8)
        with torch.no_grad():
            next(module.language_model.parameters()).fill_(float("nan"))
        return module

    with pytest.raises(DivergedError, match="NaN logits after"):
        trainer().fit(broken(), data_module())
    with pytest.raises(EditError, match=r"the hidden states of the model \(layer head\) must be finite"):
        trainer().fit(broken(), data_module(prompts=[{"prompt": "The", "response": "sky"}], validation=0.0))


def test_the_value_function_is_saved_before_the_metrics_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("kedit_train.control.control_metrics.measure_control", fail)
    path = tmp_path / "value.safetensors"
    with pytest.raises(RuntimeError, match="no memory"):
        trainer(callbacks=[ControlMetrics(["A"], step_size=1)]).fit(
            ValueModule(width=8, save_path=str(path)), data_module()
        )
    assert ValueModel.load(path).trained_on["prompt_format"] == "'plain'"


def test_the_number_of_a_record_is_its_number_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedit_train.control.response_data._CHUNK", 2)
    records = [{"prompt": "The", "response": "sky"}] * 4 + [{"prompt": "The", "response": LONG}]
    with pytest.raises(EditError, match="response 5: "):
        trainer().fit(ValueModule(width=8), data_module(prompts=records, validation=0.0))


def test_equal_states_are_not_scaled() -> None:
    value = ValueModel(["head"], hidden_size=4, width=8)
    value.standardize([{"head": torch.full((2, 4), 3.7)}])
    assert value.networks["head"].scale.tolist() == [1.0] * 4  # type: ignore[operator,union-attr]


def test_an_answer_is_generated_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        events.append(list(prompts))
        return generate_answers(model, tokenizer, prompts, **options)

    clock = itertools.count()
    monkeypatch.setattr("kedit_train.control.control_metrics.generate_answers", generate)
    monkeypatch.setattr(
        "kedit_train.control.control_metrics.time.perf_counter", lambda: (events.append("clock"), next(clock))[1]
    )
    model, tokenizer = world.load()
    value = ValueModel(["head"], hidden_size=model.config.hidden_size, width=8)
    measure_control(model, tokenizer, value, ["The", "A"], ShortAnswer(8), step_size=0.0)
    assert events == [["The"], "clock", ["The", "A"], "clock"] * 2


@pytest.mark.parametrize("prompts", [[], "The", [3]])
def test_measure_control_needs_prompts(prompts: Any) -> None:
    model, tokenizer = world.load()
    value = ValueModel(["head"], hidden_size=model.config.hidden_size, width=8)
    with pytest.raises(EditError, match=r"^measure_control: prompts must be a list of at least one text, got "):
        measure_control(model, tokenizer, value, prompts, ShortAnswer(8), step_size=1.0)


def test_equal_prompts_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # On this clock, every measurement takes one second.
    monkeypatch.setattr("kedit_train.control.control_metrics.time.perf_counter", itertools.count().__next__)
    model, tokenizer = world.load()
    value = ValueModel(["head"], hidden_size=model.config.hidden_size, width=8)
    many = measure_control(model, tokenizer, value, ["The"] * 3, ShortAnswer(8), step_size=0.0)
    one = measure_control(model, tokenizer, value, ["The"], ShortAnswer(8), step_size=0.0)
    assert many["answers_before"] == one["answers_before"] * 3
    assert many["tokens_per_second_before"] == one["tokens_per_second_before"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatternReward(re.compile("a")), "PatternReward: pattern must be a text, got re.compile('a')."),  # type: ignore[arg-type]
        (lambda: data_module(sampling=4), "ResponseDataModule: sampling must be SamplingOptions or a mapping, got 4."),
        (lambda: SamplingOptions(samples=2.0), "SamplingOptions: samples must be an integer >= 1, got 2.0."),  # type: ignore[arg-type]
        (lambda: SamplingOptions(samples=True), "SamplingOptions: samples must be an integer >= 1, got True."),
        (lambda: ControlMetrics(["A"], step_size=1, first_token=1), "first_token must be True or False, got 1."),  # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_an_error_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(EditError) as error:
        make()
    assert message in str(error.value)


def test_a_large_seed_is_a_seed() -> None:
    model, tokenizer = world.load()
    texts = [
        sample_responses(model, tokenizer, ["The"] * 4, SamplingOptions(max_new_tokens=4, seed=seed))
        for seed in (2**62, 2**62, 2**62 + 1)
    ]
    assert texts[0] == texts[1] != texts[2]
