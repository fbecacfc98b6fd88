"""ValueModule and ControlMetrics on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from control.response_runs import EIGHT_PROMPTS, IGNORED, SIX_TOKENS, records, trainer
from lightning.pytorch.loggers import CSVLogger

from kedit_train import world
from kedit_train.control import (
    ControlMetrics,
    FactReward,
    PatternReward,
    ResponseDataModule,
    SamplingOptions,
    ShortAnswer,
    ValueModel,
    ValueModule,
    controlled,
)
from kedit_train.control.responses import encode_responses
from kedit_train.control.sites import find_sites
from kedit_train.control.state_shards import read_states
from kedit_train.errors import EditError
from kedit_train.evaluation.asking.generate import generate_answers

pytestmark = IGNORED


def test_the_value_of_given_responses_is_learned(tmp_path: Path) -> None:
    edits = world.edits(6)
    path = tmp_path / "value.safetensors"
    module = ValueModule(layers=["head", 3], width=64, learning_rate=3e-3, trace=0.5, save_path=str(path))
    language_model = {name: tensor.clone() for name, tensor in module.language_model.state_dict().items()}
    data = ResponseDataModule(records(), reward=FactReward(edits), validation=0.0, batch_size=4)
    trainer(max_epochs=60).fit(module, data)
    saved = ValueModel.load(path)
    model, tokenizer = world.load()
    responses = encode_responses(model, tokenizer, records())
    for response, states in zip(
        responses, read_states(model, find_sites(model, ["head", 3]), responses, tokenizer.eos_token_id), strict=True
    ):
        (reward,) = FactReward(edits)(prompts=[response.prompt], completions=[response.text])
        for layer in ("head", "3"):
            values = saved.at(layer, states[layer]).detach()
            # Before the first token, both responses to a prompt have the same hidden state: the value is the mean of
            # their rewards, 1 and -1. At the last hidden state, the response is known.
            assert float(values[0]) == pytest.approx(0.0, abs=0.4)
            assert float(values[-1]) == pytest.approx(reward, abs=0.4)
            torch.testing.assert_close(values, module.value.at(layer, states[layer]).detach())
    # The language model is frozen and not a part of the module's checkpoint.
    after = module.language_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in language_model.items())
    assert {name.partition(".")[0] for name in module.state_dict()} == {"value", "target"}


def test_the_target_network_follows_slowly() -> None:
    module = ValueModule(width=8, target_decay=0.75)
    with torch.no_grad():
        for slow, fast in zip(module.target.parameters(), module.value.parameters(), strict=True):
            slow.fill_(0.0)
            fast.fill_(1.0)
    module.on_train_batch_end(None, None, 0)
    assert all(bool((slow == 0.25).all()) for slow in module.target.parameters())


def test_metrics_reach_the_loggers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ResponseDataModule(EIGHT_PROMPTS[:5], reward=ShortAnswer(8), sampling=SIX_TOKENS, validation=0.25)
    metrics = ControlMetrics(EIGHT_PROMPTS[5:], step_size=9.0, radius=0.1, first_token=True, max_new_tokens=6)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(max_epochs=2, logger=logger, callbacks=[metrics], log_every_n_steps=1)
    module = ValueModule(width=8)
    run.fit(module, data)
    logger.save()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"value/loss", "value/validation_error"} <= set(header)
    names = ["reward_before", "reward_after", "tokens_per_second_before", "tokens_per_second_after", "mean_change"]
    assert {f"control/{name}" for name in names} <= set(header)
    # The numbers are those of answers that are generated in the same way.
    options: dict[str, Any] = {"max_new_tokens": 6, "stops": ()}
    plain = generate_answers(module.language_model, module.tokenizer, EIGHT_PROMPTS[5:], **options)
    with controlled(module.language_model, module.value, step_size=9.0, radius=0.1, first_token=True):
        moved = generate_answers(module.language_model, module.tokenizer, EIGHT_PROMPTS[5:], **options)
    for name, answers in (("before", plain), ("after", moved)):
        rewards = ShortAnswer(8)(prompts=EIGHT_PROMPTS[5:], completions=[answer.text for answer in answers])
        assert metrics.result[f"reward_{name}"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
    assert "reward " in capsys.readouterr().out


def test_a_resumed_run_keeps_value_target_and_standardization(tmp_path: Path) -> None:
    def data() -> ResponseDataModule:
        return ResponseDataModule(EIGHT_PROMPTS[:4], reward=ShortAnswer(8), sampling=SIX_TOKENS, validation=0.0)

    torch.manual_seed(5)
    module = ValueModule(width=8)
    run = trainer(max_epochs=1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed = ValueModule(width=8)
    trainer(max_epochs=1).fit(resumed, data(), ckpt_path=str(tmp_path / "run.ckpt"))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ValueModule(trace=2), "ValueModule: trace must be in [0, 1], got 2."),
        (lambda: ValueModule(layers=[9]), 'ValueModule: each item of layers must be "head" or an index from'),
        (lambda: ValueModule(layers=[]), "ValueModule: layers must be a non-empty list, got []; pass a list, "),
        (lambda: ValueModule(layers=2), "layers must be a non-empty list, got 2; pass a list, "),  # type: ignore[arg-type]
        (lambda: ValueModule(layers="head"), "got 'head'; pass a list, for example [\"head\"] or [3, 5]."),
        (lambda: FactReward(None), "FactReward: edits must be a file or a list of Edit, got None."),  # type: ignore[arg-type]
        (lambda: FactReward([3]), "FactReward: edits must be a file or a list of Edit, got 3."),  # type: ignore[list-item]
        (lambda: ValueModule(learning_rate=0), "ValueModule: learning_rate must be > 0, got 0."),
        (lambda: ValueModule(save_path="a.pt"), "ValueModule: save_path must be a path that ends in .safetensors"),
        (lambda: ResponseDataModule([], reward=ShortAnswer()), "prompts must be a file or a non-empty list, got []."),
        (lambda: ResponseDataModule(["a", 3], reward=ShortAnswer()), "prompts, record 2: expected a prompt"),
        (
            lambda: ResponseDataModule(["a", {"prompt": "b", "response": "c"}], reward=ShortAnswer()),
            "record 2: either all records or none must have a response",
        ),
        (lambda: ResponseDataModule(["a"], reward=3), "reward must be a function reward(prompts, completions), got 3."),
        (lambda: SamplingOptions(temperature=0), "SamplingOptions: temperature must be > 0, got 0."),
        (lambda: ControlMetrics(["a"], step_size=-1), "ControlMetrics: step_size must be >= 0, got -1."),
        (lambda: PatternReward("("), "PatternReward: pattern must be a regular expression, got '('"),
        (lambda: FactReward([]), "FactReward: edits must not be empty; pass at least one edit."),
        (
            lambda: FactReward(world.edits(1))(["x"], ["y"]),
            "FactReward: the edits must contain 'x' as a prompt, a rephrase",
        ),
    ],
)
def test_a_bad_argument_is_an_error_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(EditError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 250


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, completions: [1.0], "reward must return 2 finite numbers, one per response"),
        (lambda prompts, completions: [float("nan")] * 2, "reward must return 2 finite numbers, one per response"),
        (lambda prompts, completions: ["good"] * 2, "reward must return 2 finite numbers, one per response"),
    ],
)
def test_a_wrong_reward_is_an_error_before_the_first_step(reward: Any, message: str) -> None:
    data = ResponseDataModule(records(1), reward=reward)
    with pytest.raises(EditError, match=message):
        trainer().fit(ValueModule(width=8), data)


def test_the_metrics_control_only_the_given_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def measure(*args: Any, **options: Any) -> dict[str, Any]:
        given.append(options["layers"])
        names = ("reward_before", "reward_after", "tokens_per_second_before", "tokens_per_second_after")
        return dict.fromkeys(names, 0.0)

    monkeypatch.setattr("kedit_train.control.control_metrics.measure_control", measure)
    data = ResponseDataModule(EIGHT_PROMPTS[:3], reward=ShortAnswer(8), sampling=SIX_TOKENS)
    metrics = ControlMetrics(EIGHT_PROMPTS[5:], step_size=1.0, layers=[0])
    trainer(callbacks=[metrics]).fit(ValueModule(layers=[0, "head"], width=8), data)
    assert given == [[0]]


def test_a_trained_prompt_is_not_measured() -> None:
    data = ResponseDataModule(EIGHT_PROMPTS, reward=ShortAnswer(), sampling=SIX_TOKENS)
    with pytest.raises(
        EditError, match="ControlMetrics: prompts must not contain a prompt of the ResponseDataModule, got 'The'"
    ):
        trainer(callbacks=[ControlMetrics(["The"], step_size=1)]).fit(ValueModule(width=8), data)


def test_a_file_that_is_no_value_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"x")
    with pytest.raises(EditError, match=r"^ValueModel: "):
        ValueModel.load(tmp_path / "other.safetensors")
