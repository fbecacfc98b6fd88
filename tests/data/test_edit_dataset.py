"""EditDataset: a sequence, a file and a TRL dataset."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kedit_train import world
from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.data.prompts import as_question
from kedit_train.errors import EditError

RICH = [
    Edit(
        "Ada\u2028lives\nin ",
        " Bern",
        "Ada",
        "Rome",
        ("Berne", "伯尔尼"),
        ("Ada's home is",),
        {"near": (Probe("Ben lives in", ("Basel", "Bâle")), Probe("Cid lives in")), "none": ()},
        {"far": (Probe('"Ada"\'s, country', ("\\Schweiz",)),)},
        "17",
    ),
    Edit("p", "t"),
]


def test_indices_and_slices_work_as_in_a_sequence() -> None:
    edits = EditDataset([Edit(f"p{i}", "t") for i in range(10)], name="ten", format="zsre", skipped=("why",))
    assert (len(edits), edits[3].prompt, edits[-1].prompt) == (10, "p3", "p9")
    part = edits[2:5]
    assert isinstance(part, EditDataset)
    assert [edit.prompt for edit in part] == ["p2", "p3", "p4"]
    assert (part.name, part.format, part.skipped) == ("ten", "zsre", ("why",))
    assert edits[4] in edits
    with pytest.raises(IndexError):
        edits[10]
    assert repr(edits).startswith("EditDataset('ten', 10 edits, format='zsre', 1 skipped, hash=")
    assert repr(edits).endswith("first: 'p0' -> 't')")


def test_sample_is_seeded_without_repeats_and_in_order() -> None:
    edits = EditDataset([Edit(f"p{i:03}", "t") for i in range(100)])
    drawn = [edit.prompt for edit in edits.sample(20, seed=3)]
    assert drawn == [edit.prompt for edit in edits.sample(20, seed=3)] == sorted(set(drawn))
    assert drawn != [edit.prompt for edit in edits.sample(20, seed=4)]
    assert list(edits.sample(100)) == list(edits)
    for n in (0, 101):
        with pytest.raises(EditError, match=rf"n must be from 1 to 100 \(the number of edits\), got {n}"):
            edits.sample(n)


def test_old_targets_become_the_targets_of_the_same_prompts() -> None:
    edits = EditDataset([Edit("p", "new", old_target="old", aliases=("n",), rephrases=("r",))], name="one")
    (edit,) = edits.to_old_targets()
    assert (edit.prompt, edit.target, edit.old_target, edit.aliases) == ("p", "old", None, ())
    assert edit.rephrases == ("r",)
    with pytest.raises(EditError, match="old_target must be text, got None"):
        EditDataset([Edit("p", "t")]).to_old_targets()


def test_saved_edits_are_loaded_unchanged(tmp_path: Path) -> None:
    edits = EditDataset(RICH, name="rich")
    path = edits.save(tmp_path / "new" / "rich.jsonl")
    back = EditDataset.load(path)
    assert list(back) == RICH
    assert (back.hash, back.format, back.name) == (edits.hash, "edits", "rich.jsonl")
    assert [file.name for file in path.parent.iterdir()] == ["rich.jsonl"]
    assert "伯尔尼" in path.read_text(encoding="utf-8")


def test_real_files_are_saved_and_loaded_unchanged(shared: Path, tmp_path: Path) -> None:
    for file in ("data/knowedit/wiki_recent_train.json", "models/factlm/records.json"):
        edits = EditDataset.load(shared / file)
        back = EditDataset.load(edits.save(tmp_path / "edits.jsonl"))
        assert list(back) == list(edits)
        assert back.hash == edits.hash


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EditDataset(RICH).save(tmp_path / "e.jsonl")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        EditDataset([Edit("other", "t")]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(EditError, match=r"the path must end in \.jsonl"):
        EditDataset(RICH).save(tmp_path / "e.json")


def test_the_hash_is_stable_across_processes_and_depends_on_every_field() -> None:
    edits = EditDataset(RICH, name="a")
    script = (
        "from kedit_train.data import *; import sys;"
        "print(EditDataset([Edit('p', 't', locality={'b': (Probe('q', ('a',)),), 'a': (Probe('r'),)})]).hash)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    here = EditDataset([Edit("p", "t", locality={"a": (Probe("r"),), "b": (Probe("q", ("a",)),)})], name="other")
    canonical = (
        b'{"locality":{"a":[{"answers":[],"prompt":"r"}],"b":[{"answers":["a"],"prompt":"q"}]},'
        b'"prompt":"p","target":"t"}\n'
    )
    assert run.stdout.strip() == here.hash == hashlib.sha256(canonical).hexdigest()
    assert EditDataset(RICH, name="b", format="zsre", skipped=("x",)).hash == edits.hash
    others = [
        Edit("p2", "t"),
        Edit("p", "t2"),
        Edit("p", "t", "s"),
        Edit("p", "t", None, "o"),
        Edit("p", "t", aliases=("a",)),
        Edit("p", "t", rephrases=("a",)),
        Edit("p", "t", locality={"k": (Probe("q"),)}),
        Edit("p", "t", locality={"k": (Probe("q", ("a",)),)}),
        Edit("p", "t", portability={"k": (Probe("q"),)}),
        Edit("p", "t", id="1"),
    ]
    hashes = {EditDataset([edit]).hash for edit in [Edit("p", "t"), *others]}
    assert len(hashes) == len(others) + 1
    assert EditDataset(RICH[::-1]).hash != edits.hash


def test_importing_the_data_package_imports_no_trainer() -> None:
    absent = ("trl", "datasets", "wandb", "transformers")
    script = f"import sys, kedit_train.data; print([m for m in {absent} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_prompt_completion_has_prompts_and_targets_only(factlm: Path) -> None:
    edits = EditDataset([Edit("Ada lives in", "Bern", "Ada"), Edit("Ada lives in ", "Bern"), Edit("首都是", "東京")])
    rows = edits.to_prompt_completion()
    assert rows.column_names == ["prompt", "completion"]
    assert rows.to_list() == [
        {"prompt": "Ada lives in", "completion": " Bern"},
        {"prompt": "Ada lives in ", "completion": "Bern"},
        {"prompt": "首都是", "completion": "東京"},
    ]
    real = EditDataset.load(factlm / "records.json")
    probes = {
        text for record in json.loads((factlm / "records.json").read_text()) for text in record["rephrase_prompts"]
    }
    probes -= {edit.prompt for edit in real}
    assert not probes & set(real.to_prompt_completion()["prompt"])


def test_privileged_context_is_the_fact_as_a_sentence() -> None:
    edits = EditDataset([Edit("Ada lives in", "Bern", "Ada", rephrases=("The home of Ada is",)), Edit("Who?", "Ann!")])
    rows = edits.to_privileged_context()
    assert rows.column_names == ["prompt", "privileged_context"]
    assert rows.to_list() == [
        {"prompt": "Ada lives in", "privileged_context": "Ada lives in Bern."},
        {"prompt": "Who?", "privileged_context": "Who? Ann!"},
    ]
    questions = edits.to_privileged_context(prompt_format="question")
    assert questions["prompt"][0] == as_question("Ada lives in")
    assert questions["privileged_context"][0] == "Ada lives in Bern."
    with pytest.raises(EditError, match=r"edits 1 and 2 give the prompt .* must have only one target") as error:
        EditDataset([Edit("Ada lives in", "Bern"), Edit("Ada lives in", "Rome")]).to_privileged_context()
    assert "\n" not in str(error.value)
    with pytest.raises(EditError, match="prompt_format must be"):
        edits.to_privileged_context(prompt_format="chats")  # type: ignore[arg-type]


def test_the_limit_returns_the_first_edits_of_the_world() -> None:
    edits = EditDataset.load("world")
    assert list(edits) == world.edits() == world.edits(24)
    for limit in (1, 20, 24):
        assert EditDataset.load("world", limit=limit).hash == edits[:limit].hash


def test_a_limit_above_the_number_of_bundled_edits_names_the_function_that_makes_more() -> None:
    with pytest.raises(EditError) as error:
        EditDataset.load("world", limit=25)
    assert str(error.value) == (
        'EditDataset: limit must be an integer from 1 to 24 for the edits of "world", got 25; for more edits, save '
        "EditDataset(kedit_train.world.edits(25)) to a .jsonl file and load the file."
    )
    with pytest.raises(
        EditError, match=r"^EditDataset: format must be .*edits.*, or None, for the edits of .*, got 'zsre'"
    ):
        EditDataset.load("world", format="zsre")


@pytest.mark.slow
def test_the_package_and_the_data_package_load_the_world_without_its_import() -> None:
    for module in ("kedit_train", "kedit_train.data"):
        script = f"from {module} import EditDataset; print(len(EditDataset.load('world', limit=3)))"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "3"


@pytest.mark.parametrize("path", [None, 3, ["edits.json"]])
def test_a_path_of_another_type_is_one_line(path: Any) -> None:
    with pytest.raises(
        EditError, match=r"^EditDataset: path must be a non-empty path without NUL characters, got .*\.$"
    ):
        EditDataset.load(path)
