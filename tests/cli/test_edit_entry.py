"""The command `python -m kedit_train`: each error is one line."""

from __future__ import annotations

import re
import sys
import time
import warnings
from pathlib import Path

import pytest

from kedit_train.cli import main as entry
from kedit_train.cli import recipe
from kedit_train.cli.config_errors import HELP, shorten
from kedit_train.errors import EditError

# Lightning 2.6 still calls what jsonargparse 4.53 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

BASE = """
data: {path: world, limit: 4}
trainer:
  logger: false
  callbacks:
  - class_path: kedit_train.callbacks.KLLocality
    init_args: {texts: world}
  - class_path: kedit_train.callbacks.EditMetrics
"""
# Eight lines that stand for 9**7 values.
LAUGHS = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{f'*{b}, ' * 9}]\n" for b, c in zip("abcdefg", "bcdefgh", strict=True))


@pytest.fixture
def failing_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run the command and return the exit code and the error line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it, and monkeypatch restores it
    Path("base.yaml").write_text(BASE)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edit.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return ended.value.code, lines[0]  # type: ignore[return-value]

    return run


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("trainer: {max_epoch: 3}", ["'trainer.max_epoch'"]),
        ("modle: {name: x}", ["modle"]),
        ("model: {nam: x}", ["EditModule: Option 'nam'", "valid arguments: name, learning_rate"]),
        ("trainer: {max_epochs: many}", ["trainer.max_epochs", "expected int", "many"]),
        (
            "trainer: {callbacks: [{class_path: kedit_train.callbacks.TokenSmoothing, init_args: {lamb: 1}}]}",
            [
                "trainer.callbacks: kedit_train.callbacks.TokenSmoothing: Option 'lamb'",
                "valid arguments: objective, label_weight",
            ],
        ),
        ("trainer: {callbacks: [{class_path: kedit_train.callbacks.Smooth}]}", ["no attribute 'Smooth'"]),
        (
            "trainer: {callbacks: [{class_path: kedit_train.callbacks.PrefixCache}, {class_path: os.system}]}",
            [
                "trainer.callbacks: Import path os.system does not correspond to a subclass of Callback; python -m "
                "kedit_train fit --help"
            ],
        ),
        (
            "trainer: {callbacks: [{class_path: kedit_train.callbacks.PrefixCache}, {class_path: [1, 2]}]}",
            [
                "trainer.callbacks: class_path must be the path of a class, such as kedit_train.callbacks.TokenLoss; "
                "python -m kedit_train fit --help"
            ],
        ),
        (
            "trainer: {callbacks: [{class_path: kedit_train.callbacks.TokenLoss, init_args: [1]}]}",
            [
                "kedit_train.callbacks.TokenLoss: init_args must be a mapping of arguments to values; python -m "
                "kedit_train fit --help"
            ],
        ),
        ("trainer: [", ["bad.yaml: ", "parsing"]),
        ("trainer:\n  max_epochs: 1\n  max_epochs: 2", ["bad.yaml: ", "'max_epochs' is given twice, at line 2 and at"]),
        ("trainer: 3", ["trainer must be a mapping of keys to values, got 3"]),
        ("trainer: {callbacks: 3}", ["trainer.callbacks"]),
        ("trainer: &t {callbacks: *t}", ["the alias at line 1 contains itself"]),
        ("trainer: {callbacks: '&x [*x]'}", ["trainer.callbacks"]),
        (LAUGHS, ["the aliases expand to more than 100,000 characters"]),
        ("trainer: {max_epochs: !!int x}", ["a value does not fit its type"]),
        ("trainer: {max_epochs: " + "9" * 5000 + "}", ["the number at line 1 has more than 100 digits"]),
    ],
)
def test_a_wrong_key_is_named(failing_run, yaml: str, expected: list[str]) -> None:
    Path("bad.yaml").write_text(yaml)
    code, message = failing_run("fit", "--config", "bad.yaml")
    assert code == 2
    assert all(part in message for part in expected), message
    assert "NoneType" not in message
    assert len(message) < 300


ENTRY = "entry {} of trainer.callbacks must be a class with its arguments, got {}; write, for example, 'class_path: k"


@pytest.mark.parametrize(
    ("yaml", "number", "given"),
    [
        ("trainer: {callbacks: [null]}", 1, "null"),
        ("trainer:\n  callbacks+:\n  - kedit_train.callbacks.NormBall\n  -\n", 2, "null"),
        ("trainer.callbacks: [3]", 1, "3"),
        ("fit: {trainer: {callbacks: [true]}}", 1, "true"),
        ("trainer: {callbacks: [[kedit_train.callbacks.NormBall]]}", 1, '["kedit_train.callbacks.NormBall"]'),
        ("trainer: {callbacks: [{radius: 0.1}]}", 1, '{"radius": 0.1}'),
    ],
)
def test_an_entry_of_the_callbacks_that_is_no_class_is_named_by_its_number(
    failing_run, yaml: str, number: int, given: str
) -> None:
    Path("bad.yaml").write_text(yaml)
    command = () if yaml.startswith("fit") else ("fit",)
    code, message = failing_run(*command, "--config", "bad.yaml", *(() if command else ("fit",)))
    assert code == 2
    assert "bad.yaml: " + ENTRY.format(number, given) in message, message


TWICE = """model: {name: world}
trainer:
  callbacks:
  - class_path: kedit_train.callbacks.PrefixCache
  callbacks:
  - class_path: kedit_train.callbacks.EditMetrics
"""


def test_a_key_that_is_given_twice_is_named_with_its_file_and_lines(failing_run) -> None:
    Path("twice.yaml").write_text(TWICE)
    expected = "twice.yaml: Problems parsing config: the key 'callbacks' is given twice, at line 3 and at line 5"
    code, message = failing_run("sft", "--config", "base.yaml", "--config", "twice.yaml")
    assert code == 2
    assert expected in message


def test_a_configuration_that_is_not_text_is_one_line(failing_run) -> None:
    Path("bad.yaml").write_bytes(b"trainer: \xff")
    for command in ("fit", "sft"):
        code, message = failing_run(command, "--config", "bad.yaml")
        assert code == 2
        assert "the configuration cannot be read (UnicodeDecodeError: " in message


@pytest.mark.parametrize("arguments", [["foo"], []])
def test_an_unknown_command_names_both_trainers(failing_run, arguments: list[str]) -> None:
    code, message = failing_run(*arguments)
    assert code == 2
    assert "fit, sft" in message


def test_an_unknown_key_of_the_last_callback(failing_run) -> None:
    code, message = failing_run("fit", "--config", "base.yaml", "--trainer.callbacks.layers", "2.5")
    assert code == 2
    assert "EditMetrics: Option 'layers' is not accepted; valid arguments: edits, every_n_steps" in message
    assert "--trainer.callbacks.CLASS.KEY" in message
    assert "lightning.Callback" not in message


def test_a_wrong_value_for_the_last_callback(failing_run) -> None:
    _, message = failing_run("fit", "--config", "base.yaml", "--trainer.callbacks.every_n_steps", "x")
    assert "EditMetrics: every_n_steps: expected int" in message
    assert "lightning.Callback" not in message


def test_a_callback_key_without_callbacks(failing_run) -> None:
    _, message = failing_run("fit", "--trainer.callbacks.layers", "2.5")
    assert "lists no callbacks" in message


FRAGMENTS = ("--config", "base.yaml", "--config", "callbacks/null_space.yaml")


def test_a_callback_is_addressed_by_its_class_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The order of the fragments makes no difference."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    named = ("--trainer.callbacks.KLLocality.texts=keep.txt", "--trainer.callbacks.KLLocality.weight", "3")
    config = recipe.parse([*FRAGMENTS, "--model.name=gpt2", *named])
    kl, _, space = config.trainer.callbacks
    assert (kl.init_args.texts, kl.init_args.weight) == ("keep.txt", 3.0)
    assert space.init_args.texts == "texts_that_must_stay.txt"
    assert recipe.built(kl).texts.source == "keep.txt"


def test_the_last_callback_is_named_when_it_is_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    recipe.parse([*FRAGMENTS, "--trainer.callbacks.texts", "keep.txt"])
    assert capsys.readouterr().out == (
        "NullSpace, the last callback in the list, received texts; to choose another callback, write "
        "--trainer.callbacks.CLASS.texts\n"
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--trainer.callbacks.NormBall.radius=1",
            "needs exactly one callback NormBall in the run, got 0; the run has the callbacks: KL",
        ),
        ("--trainer.callbacks.KLLocality.text=1", "KLLocality has no argument 'text'; valid arguments: texts, weight"),
        ("--trainer.callbacks.KLLocality.weight=x", "KLLocality.weight: "),
        ("--trainer.callbacks.KLLocality.weight", "KLLocality.weight needs a value"),
    ],
)
def test_a_wrong_argument_of_a_named_callback_is_one_line(failing_run, argument: str, message: str) -> None:
    _, line = failing_run("fit", "--config", "base.yaml", argument)
    assert message in line, line


def test_only_deprecations_in_other_libraries_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry.quiet()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`learning_rate` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert [str(one.message)[:15] for one in caught] == ["`learning_rate`"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.path", "edits.jsonl"], "data.path='edits.jsonl'.*--data.texts"),
        (["--model.name", "gpt2"], "model.name='gpt2'.*--data.texts"),
        (["--data.path", "edits.jsonl", "--data.texts", "world"], "edits.jsonl"),
        (
            ["--data.augmentation.replay", "world", "--model.name", "gpt2"],
            "data.augmentation.replay='world'.*model.name='gpt2'.*--data.augmentation.replay FILE",
        ),
        (["--data.batch_size", "0"], "batch_size must be .*, got 0"),
        (["--data.texts", "none.txt", "--model.name", "no/such/folder"], "no/such/folder.*save_pretrained"),
        (["--trainer.callbacks.every_n_steps", "-1"], "every_n_steps must be .*, got -1"),
    ],
)
def test_runs_that_cannot_be_carried_out(failing_run, arguments: list[str], expected: str) -> None:
    code, message = failing_run("fit", "--config", "base.yaml", *arguments)
    assert code == 1
    assert re.search(expected, message), message


def test_texts_that_no_callback_uses(failing_run) -> None:
    code, message = failing_run("fit", "--data.texts", "mine.txt")
    assert code == 1
    assert "is not used" in message


def test_an_environment_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDIT_TRACEBACK", "1")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["edit.py", "fit", "--data.texts", "mine.txt"])
    with pytest.raises(EditError, match="is not used"):
        entry.main()


def test_an_unknown_config_error_is_kept_whole() -> None:
    assert shorten("something new\n  - with details") == f"something new; with details; {HELP} lists every key"
    text = "a: no.such.module: Option 'b' is not accepted"
    assert shorten(text) == f"{text}; {HELP} lists every key"


@pytest.mark.parametrize("value", ["x" * 100_000, "a.b" * 30_000, "'" * 50_000, "x: " * 30_000])
def test_a_long_value_makes_neither_a_long_message_nor_a_long_wait(value: str) -> None:
    """The patterns that shorten a message once took seconds for a class name of 20,000 letters."""
    message = f'Parser key "trainer.callbacks":\n  - Expected a dot import path string: {value}\n  Given value: {value}'
    began = time.process_time()
    line = shorten(message)
    assert time.process_time() - began < 1
    assert len(line) < 2100
    assert line.startswith("trainer.callbacks: expected the path of a class, such as kedit_train.callbacks.TokenLoss")
