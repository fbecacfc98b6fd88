"""Study rows: written once by a model, read from a file, kept free of evaluation prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kedit_train import world
from kedit_train.augmentation import AugmentationOptions, StudyRow, StudyRows, augmentation, study_rows
from kedit_train.augmentation.study import is_grounded
from kedit_train.augmentation.study_writer import _request
from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.data.prompts import as_question
from kedit_train.errors import EditError
from kedit_train.modes import ExampleOptions, TrainLoop

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501
FERRY = Edit(
    "The ferry\n\n",
    "Orla runs the ferry since 1987.",
    portability={"questions": (Probe("Who steers the ferry?", ("Orla",)),)},
    id="ferry.txt",
)
LOCK = Edit("The lock\n\n", "The lock of Tarn is closed.")
WRITES = {
    ("paraphrase", "The ferry"): "Since 1987, the ferry is run by Orla.",
    ("question", "The ferry"): (
        "Q: Who runs it?\nA: Orla\n**Q2:** Since when?\n**A2:** 1990\nQ: Who steers the ferry?\nA: Orla."
    ),
    ("implication", "The ferry"): "Orla has a job.",
    ("paraphrase", "The lock"): "The lock of Tarn is closed.",
    ("question", "The lock"): "I cannot do this.",
    ("implication", "The lock"): "Boats must wait. Three of them wait.",
}  # fmt: skip
KINDS = ("paraphrase", "question", "implication")


def scripted(make: Any, answers: dict[tuple[str, str], str], **options: Any) -> tuple[Any, Any]:
    """Return a model that writes the given texts when it is asked for them."""
    model, tokenizer = make({}, context=4000)
    tokenizer.chat_template = TEMPLATE
    edits = {"The ferry": FERRY, "The lock": LOCK}
    script = {
        tokenizer.decode(_request(tokenizer, edits[title], kind)): text for (kind, title), text in answers.items()
    }
    endless = options.get("endless", ())
    again = {prompt: text for prompt, text in script.items() if text in endless}
    model, tokenizer = make({p: t for p, t in script.items() if p not in again}, endless=again, context=4000)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture
def writer(scripted_model: Any) -> tuple[Any, Any]:
    return scripted(scripted_model, WRITES)


def write(writer: Any, path: Path, **options: Any) -> StudyRows:
    return study_rows(*writer, [FERRY, LOCK], path, **{"kinds": KINDS, **options})


def test_rows_are_written_checked_and_read_again(writer: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "study.jsonl"
    rows = write(writer, path)
    assert rows.rows == (
        StudyRow("paraphrase", "The ferry", "In other words: The ferry\n\n", "Since 1987, the ferry is run by Orla."),
        StudyRow("question", "The ferry", "Who runs it?", "Orla"),
        StudyRow("implication", "The ferry", "What follows from: The ferry\n\n", "Orla has a job."),
        StudyRow("implication", "The lock", "What follows from: The lock\n\n", "Boats must wait. Three of them wait."),
    )
    # A copy of a document, and a text without questions. 1990 is not in the document. One question is a probe.
    assert (rows.texts, rows.unusable, rows.rejected, rows.leaked) == (6, 2, 1, 1)
    assert rows.describe() == (
        "4 study rows from 6 texts (2 texts were not usable, 1 rows were rejected by verify, and 1 rows contained an "
        "evaluation prompt)"
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["settings"]["kinds"] == list(KINDS)
    assert lines[2] == {"kind": "question", "document": "The ferry", "prompt": "Who runs it?", "text": "Orla"}
    calls = writer[0].calls
    assert write(writer, path) == rows
    assert writer[0].calls == calls


def test_a_person_can_edit_the_file(writer: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write(writer, path)
    lines = path.read_text().splitlines()
    mine = {"kind": "question", "document": "The lock", "prompt": "Which lock is closed?", "text": "that of Tarn"}
    leak = {**mine, "document": "The ferry", "text": "Who steers the FERRY? Orla."}
    path.write_text("\n".join([*lines[:2], "", json.dumps(mine), json.dumps(leak)]))
    rows = write(writer, path)
    assert [row.prompt for row in rows.rows] == ["In other words: The ferry\n\n", "Which lock is closed?"]
    assert rows.leaked == 1
    for line, message in (
        ("{", r"study.jsonl, line 2: the line is not valid JSON"),
        (
            json.dumps({**mine, "text": " "}),
            r"line 2: a row must have exactly the fields 'kind', 'document', 'prompt', 'text'",
        ),
        (
            json.dumps({**mine, "document": "The bell"}),
            r"line 2: the field \"document\" must be the title of a document .* 'The bell'",
        ),
    ):
        path.write_text(f"{lines[0]}\n{line}\n")
        with pytest.raises(EditError, match=message) as caught:
            write(writer, path)
        assert "\n" not in str(caught.value)
    path.write_text("{}\n")
    with pytest.raises(EditError, match="the first line must contain the settings"):
        write(writer, path)


def test_a_file_is_read_with_its_own_settings(writer: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    rows = write(writer, path)
    before = path.read_bytes()
    # Warnings are errors in these tests. Settings that are not given come from the file.
    assert study_rows(*writer, [FERRY, LOCK], path) == rows
    with pytest.warns(UserWarning, match="study_rows") as caught:
        assert write(writer, path, per_kind=2, seed=1) == rows
    assert [str(warning.message) for warning in caught] == [
        f"study_rows: {path} was written with per_kind=1, seed=0. The rows of this file are used, so the arguments "
        "per_kind=2, seed=1 have no effect; to write new rows, give another path."
    ]
    # Other evaluation questions do not change the texts.
    study_rows(*writer, [Edit(FERRY.prompt, FERRY.target), LOCK], path)
    documents = EditDataset([FERRY, LOCK])
    for seed in (0, 5):
        assert "4 study rows" in augmentation(*writer, documents, study=path, seed=seed).summary
    assert path.read_bytes() == before


def test_a_file_for_other_documents_is_an_error(writer: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write(writer, path)
    before = path.read_bytes()
    with pytest.raises(EditError) as caught:
        study_rows(*writer, [FERRY, Edit(LOCK.prompt, "The lock of Tarn is open.")], path)
    assert str(caught.value) == (
        f"study_rows: {path} was written for another version of the document 'The lock'; pass that version, or give "
        "another path."
    )
    message = r"line 6: the field \"document\" must be the title of a document of the run, got 'The lock'"
    with pytest.raises(EditError, match=message):
        study_rows(*writer, [FERRY], path)
    assert path.read_bytes() == before


def test_verify_is_applied_to_a_file_only_if_it_is_given(writer: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write(writer, path)
    mine = {"kind": "question", "document": "The lock", "prompt": "Where is the lock?", "text": "in the north"}
    with path.open("a") as file:
        file.write(json.dumps(mine))
    assert len(write(writer, path).rows) == 5
    rows = write(writer, path, verify=is_grounded)
    assert (len(rows.rows), rows.rejected, rows.leaked) == (4, 2, 1)
    with pytest.raises(EditError) as caught:
        write(writer, path, verify=lambda row, document: False)
    assert str(caught.value) == (
        f"study_rows: {path} has no study row that can be trained: verify rejected 6 rows, and 0 rows contain an "
        "evaluation prompt; add rows to the file, or give another path."
    )
    path.write_text(path.read_text().split("\n")[0])
    with pytest.raises(EditError, match="has no study row that can be trained"):
        write(writer, path)


def test_bad_input_is_reported_in_one_line(writer: Any, scripted_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    with pytest.raises(EditError) as caught:
        write(writer, path, verify=lambda row, document: False)
    assert str(caught.value) == (
        "study_rows: no study row is left: 2 of the 6 generated texts gave no usable row, and verify rejected the 6 "
        "rows of the others; pass another verify, let a larger model write the rows, or train without study rows."
    )
    assert not path.exists()
    model, tokenizer = scripted_model({}, context=4000)
    with pytest.raises(EditError) as caught:
        write((model, tokenizer), path)
    assert str(caught.value) == (
        "study_rows: the tokenizer must have a chat template, but has none; set tokenizer.chat_template, or call "
        "study_rows with a chat model and pass its result as study=."
    )
    with pytest.raises(
        EditError, match=r"document 'The ferry' and max_new_tokens=3990 must fit into the context .*4000"
    ):
        write(writer, path, max_new_tokens=3990)
    for wrong in ((), ("poem",), "question"):
        with pytest.raises(EditError, match=r"study_rows: kinds must be a list .* of one or more of paraphrase, q"):
            write(writer, path, kinds=wrong)


def test_a_text_that_does_not_end_is_not_used(scripted_model: Any, tmp_path: Path) -> None:
    text = WRITES["implication", "The lock"]
    rows = write(scripted(scripted_model, WRITES, endless={text}), tmp_path / "study.jsonl")
    assert (len(rows.rows), rows.unusable) == (3, 3)


@pytest.mark.parametrize(
    ("kind", "text", "grounded"),
    [
        ("question", "1987", True),
        ("question", "orla.", True),
        ("question", "Orl", False),
        ("question", ".", False),
        ("question", "?", False),
        ("question", "Since 1987 and before", False),
        ("paraphrase", "Orla does it since 1987", True),
        ("continuation", "In 1988, Orla stops.", False),
    ],
)
def test_the_default_check_compares_answers_and_numbers(kind: str, text: str, grounded: bool) -> None:
    assert is_grounded(StudyRow(kind, "The ferry", "p", text), FERRY) is grounded


def with_template() -> tuple[Any, Any]:
    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def test_samples_depend_on_the_seed_and_not_on_the_state_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = with_template()
    # This small model knows no chats and would write nothing. So its tokens are almost random, and many end a text.
    monkeypatch.setattr("kedit_train.augmentation.study_writer._SAMPLING", {"do_sample": True, "temperature": 20.0})
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 20))
    edits = [Edit("News", f"{edit.prompt} {edit.target}.") for edit in world.edits(1)]
    options: dict[str, Any] = {"verify": lambda row, document: True, "per_kind": 6, "kinds": ("paraphrase",)}
    options["max_new_tokens"] = 100
    state = torch.random.get_rng_state()
    one = study_rows(model, tokenizer, edits, tmp_path / "a.jsonl", **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert study_rows(model, tokenizer, edits, tmp_path / "b.jsonl", **options) == one
    assert study_rows(model, tokenizer, edits, tmp_path / "c.jsonl", seed=1, **options).rows != one.rows
    assert len({row.prompt for row in one.rows}) == len(one.rows)


def test_study_rows_are_trained_with_their_documents(writer: Any, tmp_path: Path) -> None:
    rows = write(writer, tmp_path / "study.jsonl")
    model, tokenizer = world.load()
    documents = EditDataset([FERRY, LOCK])
    augment = augmentation(model, tokenizer, documents, study=rows)
    assert "4 study rows from 6 texts" in augment.summary
    assert "4 study rows are trained" in augment.summary
    assert [row.prompt for row in augment(documents)][1:3] == [
        as_question("Who runs it?"),
        "What follows from: The ferry\n\n",
    ]
    # Of a single document, only its own rows are trained.
    assert len(augment([LOCK])) == 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    TrainLoop(tokenizer, epochs=1, examples=ExampleOptions(extra_edits=augment))(model, documents)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(EditError, match=r"^augmentation: study_ratio=2\.0 has no effect, because study is None"):
        augmentation(model, tokenizer, documents, study_ratio=2.0)
    with pytest.raises(EditError, match="study_ratio must be"):
        AugmentationOptions(study="study.jsonl", study_ratio=0)
