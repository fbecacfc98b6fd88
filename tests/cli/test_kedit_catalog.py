"""The command kedit, and its verbs that need no model: ls, cp and validate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from project_file import project_file

from kedit_train import catalog
from kedit_train.cli.kedit import VERBS, parser
from kedit_train.errors import EditError

# Lightning 2.6 still calls what jsonargparse 4.53 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
Kedit = Callable[..., tuple[int, str, str]]
# Nine lines that stand for 10**9 values.
LAUGHS = [
    "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
    *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
]


def _callbacks(*names: str, **arguments: str) -> str:
    """Return the section of a recipe that lists callbacks. The first two get the arguments."""
    entries = [
        {"class_path": f"kedit_train.callbacks.{name}"} | ({"init_args": arguments} if name != "PrefixCache" else {})
        for name in names
    ]
    return json.dumps({"trainer": {"callbacks": entries}})


BAD = {
    "argument.yaml": (
        "trainer: {callbacks: [{class_path: kedit_train.callbacks.TokenSmoothing, init_args: {lamb: 1}}]}",
        "valid arguments: objective, label_weight",
    ),
    "bound.yaml": (
        "trainer: {callbacks+: [{class_path: kedit_train.callbacks.EditMetrics, init_args: {every_n_steps: -1}}]}",
        "every_n_steps must be an integer >= 0, got -1",
    ),
    "batch.yaml": ("data: {batch_size: -1}", "EditDataModule: batch_size must be an integer >= 1, got -1"),
    "class.yaml": ("trainer: {callbacks+: [{class_path: kedit_train.callbacks.Smooth}]}", "no attribute 'Smooth'"),
    "empty.yaml": ("", "contains no keys"),
    "foreign.yaml": (
        "model: {name: gpt2}\n"
        "trainer: {callbacks: [{class_path: kedit_train.callbacks.KLLocality, init_args: {texts: world}}]}",
        "data.texts",
    ),
    "key.yaml": ("trainer: {max_epoch: 3}", "'trainer.max_epoch'"),
    "laughs.yaml": ("\n".join(LAUGHS), "the aliases expand to more than 100,000 characters"),
    "list.yaml": ("trainer: [1, 2]", "trainer must be a mapping of keys to values, got [1, 2]"),
    "number.yaml": ("trainer: 3", "trainer must be a mapping of keys to values, got 3"),
    "recursive.yaml": ("a: &x [*x]", "the alias at line 1 contains itself"),
    "recursive_callbacks.yaml": ("trainer: &t\n  callbacks: *t", "the alias at line 2 contains itself"),
    "epochs.yaml": ("trainer: {max_epochs: -5}", "trainer: max_epochs must be an integer >= 1, or -1 for no limit, or"),
    "steps.yaml": ("trainer: {max_steps: 0}", "trainer: max_steps must be an integer >= 1, or -1 for no limit, got 0"),
    "range.yaml": (
        _callbacks("ParameterScope", layers="0.9-0.3"),
        "ParameterScope: a range in layers must start at its lower layer, got '0.9-0.3'; write '0.3-0.9'",
    ),
    "limit.yaml": ("data: {limit: 0}", "limit must be an integer >= 1, or None, got 0"),
    "prefixes.yaml": ("data: {augmentation: {prefixes: -1}}", "prefixes must be an integer >= 0, got -1"),
    "rate.yaml": ("model: {learning_rate: -1}", "EditModule: learning_rate must be >= 0, got -1"),
    "no_loss.yaml": (
        "seed_everything: 0\ntrainer: " + _callbacks("SecondOrderLocality", "PrefixCache", texts="world")[12:-1],
        "SecondOrderLocality: this callback computes the length of each step from the training loss, which no callback "
        "of this run measures; add TokenLoss",
    ),
    "second.yaml": (
        _callbacks("SecondOrderLocality", "SecondOrderLocality", texts="world"),
        "SecondOrderLocality: there are two callbacks of this class on this model; the second one would replace",
    ),
    "two_steps.yaml": (
        '{"trainer": {"callbacks": ['
        + ", ".join(f'{{"class_path": "kedit_train.callbacks.{name}"}}' for name in ("PolyakStep", "TokenLoss"))
        + ', {"class_path": "kedit_train.callbacks.SecondOrderLocality", "init_args": {"texts": "world"}}]}}',
        "another callback also replaces the optimizer step; keep only one of PolyakStep, SecondOrderLocality "
        "and SubjectValues",
    ),
    "conflict.yaml": (_callbacks("TokenLoss", "TokenSmoothing"), "already replaces the training loss; keep only one"),
    "twice.yaml": (
        "trainer:\n  callbacks+:\n  - class_path: kedit_train.callbacks.EditMetrics\n    init_args:\n"
        "      every_n_steps: 1\n      every_n_steps: 2\n",
        "the key 'every_n_steps' is given twice, at line 5 and at line 6",
    ),
    "text.yaml": ("trainer: {callbacks: '&x [*x]'}", "callbacks"),
    "type.yaml": ("trainer: {max_epochs: many}", "expected int"),
    "yaml.yaml": ("trainer: [", "is not valid YAML"),
}


def test_the_console_script_runs_without_torch() -> None:
    scripts = project_file()["project"]["scripts"]
    module, _, function = scripts["kedit"].partition(":")
    assert callable(getattr(import_module(module), function))
    code = (
        f"import sys; from {module} import {function} as main; sys.argv = ['kedit', 'ls', 'recipes']; code = main();"
        " assert not {'torch', 'transformers', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "quickstart" in ended.stdout


def test_every_example_in_the_help_parses(kedit: Kedit) -> None:
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        code, output, _ = kedit(name, "--help")
        assert (code, "examples:" in output) == (0, True)
        examples = [line.strip() for line in verb.EPILOG.splitlines() if line.startswith(f"  kedit {name}")]
        assert examples
        for example in examples:
            words = example.split("    ")[0].split()[1:]
            assert parser().parse_args(words).run is verb.run, example


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "VERB"),
        (["bogus"], "bogus.*kedit --help"),
        (["show"], "DELTA.*kedit show --help"),
        (["ls", "models"], "models"),
        (["merge", "a.safetensors", "--weights", "nan", "-o", "b"], "expected a finite number"),
        (["eval", "--json", "world", "edits.jsonl"], "EDITS"),
    ],
)
def test_wrong_arguments_are_one_line(kedit: Kedit, words: list[str], message: str) -> None:
    code, out, err = kedit(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err


def test_an_environment_variable_shows_the_traceback(kedit: Kedit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDIT_TRACEBACK", "1")
    with pytest.raises(EditError, match="'nothing' is neither a file"):
        kedit("cp", "nothing")


def test_ls_lists_every_recipe_and_fragment_with_a_sentence(kedit: Kedit) -> None:
    code, output, _ = kedit("ls", "--json")
    rows = json.loads(output)
    assert code == 0
    for kind in ("recipes", "callbacks"):
        assert [row["name"] for row in rows if row["kind"] == kind] == catalog.names(kind)
    assert all(Path(row["path"]).is_file() and len(row["about"]) > 30 for row in rows)
    code, output, _ = kedit("ls", "callbacks")
    assert "token_smoothing" in output
    assert "quickstart" not in output


def test_cp_copies_a_packaged_file(kedit: Kedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kedit("cp", "quickstart")[0] == 0
    assert Path("quickstart.yaml").read_bytes() == catalog.find("recipes", "quickstart").read_bytes()
    code, output, _ = kedit("cp", "callbacks/kl_locality.yaml", "new/", "--json")
    assert (code, json.loads(output)["to"]) == (0, "new/kl_locality.yaml")
    assert Path("new/kl_locality.yaml").read_bytes() == catalog.find("callbacks", "kl_locality").read_bytes()
    Path("quickstart.yaml").write_text("mine")
    for words, reason in (
        (["quickstart"], "already exists.*--force"),
        (["kl_locality"], "recipes/kl_locality or callbacks/kl_locality"),
        (["trl_sft", "mine.yaml"], r"\.py"),
        (["missing"], "run kedit ls"),
    ):
        code, _, err = kedit("cp", *words)
        assert code == 1
        assert re.search(reason, err), err
    assert Path("quickstart.yaml").read_text() == "mine"
    assert kedit("cp", "quickstart", "--force")[0] == 0
    assert Path("quickstart.yaml").read_text() != "mine"


def test_all_packaged_files_are_valid(kedit: Kedit) -> None:
    kinds: tuple[catalog.Kind, ...] = ("recipes", "callbacks")
    files = {f"{kind}/{name}": catalog.find(kind, f"{kind}/{name}") for kind in kinds for name in catalog.names(kind)}
    names = [name for name, file in files.items() if file.suffix == ".yaml"]
    code, output, _ = kedit("validate", "--json", *names)
    rows = {row["file"]: row for row in json.loads(output)}
    assert code == 0, output
    assert {name: row["error"] for name, row in rows.items()} == dict.fromkeys(names)
    assert {row["kind"] for name, row in rows.items() if name.startswith("callbacks/")} == {"fragment"}
    assert {row["kind"] for name, row in rows.items() if name.startswith("recipes/")} == {"recipe"}
    assert rows["callbacks/kl_locality"]["callbacks"] == ["KLLocality"]


def test_validate_names_the_error_in_each_file(kedit: Kedit, tmp_path: Path) -> None:
    for name, (text, _) in BAD.items():
        (tmp_path / name).write_text(text)
    code, out, err = kedit("validate", *(tmp_path / name for name in BAD))
    lines = err.splitlines()
    assert (code, out, len(lines)) == (1, "", len(BAD))
    for line, (name, (_, reason)) in zip(lines, BAD.items(), strict=True):
        assert name in line
        assert reason in line, line


def test_validate_needs_no_gpu_no_model_and_no_data(kedit: Kedit, tmp_path: Path) -> None:
    """The model and the data of this recipe do not exist, and there is no GPU."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {name: no/such-model}\ndata: {path: nowhere.jsonl}\n"
        "trainer: {accelerator: gpu, devices: 8, precision: bf16-mixed, max_epochs: 3}\n"
    )
    assert kedit("validate", path) == (0, f"{path}: valid recipe (no callbacks)\n", "")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("nope.yaml", "run kedit ls for all names."),
        ("quikstart.yaml", "write recipes/quickstart, or run kedit ls for all names."),
        ("kl_localty", "write recipes/kl_locality or callbacks/kl_locality, or run kedit ls for all names."),
    ],
)
def test_a_name_that_does_not_exist_gives_few_similar_names(kedit: Kedit, name: str, advice: str) -> None:
    message = f"{name!r} is neither a file nor a packaged recipe or fragment; {advice}"
    assert kedit("validate", name) == (1, "", f"error: {name}: {message}\n")
    assert kedit("cp", name) == (1, "", f"error: {message}\n")
