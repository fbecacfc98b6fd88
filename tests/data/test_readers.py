"""Every format: a record and the edit that it becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.errors import EditError

COUNTERFACT = {
    "case_id": 7,
    "prompt": "The mother tongue of Ada is",
    "target_new": " English ",
    "ground_truth": "French",
    "subject": "Ada",
    "rephrase_prompt": "Ada speaks",
    "locality_prompt": "Ben is a native speaker of",
    "locality_ground_truth": "French",
}
NESTED = {
    "case_id": 3,
    "pararel_idx": 11,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Ada",
    },
    "paraphrase_prompts": ["Ada speaks", "Ada grew up with"],
    "neighborhood_prompts": ["Ben speaks", "Cid speaks"],
    "attribute_prompts": ["Dora speaks"],
    "generation_prompts": ["Ada was at home when"],
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What does UniFirst make?",
    "pred": "cloth",
    "rephrase": "What is UniFirst's product?",
    "alt": " aircraft",
    "answers": ["uniforms", "clothes"],
    "loc": "nq question: who wrote it",
    "loc_ans": "Someone",
    "cond": "uniforms >> aircraft || What does UniFirst make?",
}
KNOWEDIT = {
    "subject": "Ada",
    "prompt": "The gender of Ada is",
    "target_new": "female",
    "ground_truth": [["male", "man"]],
    "rephrase_prompt": "What is Ada's gender?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Ada was born in", "ground_truth": [["Rome", "Roma"], [], ["Roma", "Urbs"]]},
            {"prompt": "Ada's father is", "ground_truth": [[]]},
        ],
        "Forgetfulness": [{"prompt": "Ada is", "ground_truth": ["a poet", "a nun"]}],
    },
    "portability": {
        "Reasoning": [{"prompt": "Ada's son calls her", "ground_truth": "mother"}],
        "Logical_Generalization": [],
        "Subject_Aliasing": None,
    },
}
WIKIBIGEDIT = {
    "tag": "P6",
    "subject": "Ada",
    "update": "Who leads Ada's town?",
    "rephrase": "Who is at the head of Ada's town?",
    "personas": "Mate, who leads Ada's town?",
    "ans": "Ben",
    "mhop": "Where was the leader of Ada's town born?",
    "mhop_ans": "Bern",
    "loc": "Who leads Basel?",
    "loc_ans": "Cid",
}
QAEDIT = {
    "id": "q-1",
    "source": "nq",
    "prompt": "who wrote it?",
    "target": "Ben",
    "subject": "it",
    "rephrase": "by whom was it written?",
    "locality": [{"loc": f"nq question: question {i}", "loc_ans": f"answer {i}"} for i in range(5)],
}
MQUAKE = {
    "case_id": 9,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia"},
            "target_true": {"str": "USA"},
            "subject": "Ada",
            "question": "What is Ada a citizen of?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Split"},
            "target_true": {"str": "Zagreb"},
            "subject": "Croatia",
            "question": "What is Croatia's capital?",
        },
    ],
    "questions": ["Q one?", "Q two?", "Q three?"],
    "answer": "Washington",
    "answer_alias": ["D.C."],
    "new_answer": "Split",
    "new_answer_alias": ["Spalato", "Split"],
    "single_hops": [],
    "new_single_hops": [],
}
OWN = {
    "id": "a",
    "prompt": "Ada lives in",
    "target": "Bern",
    "subject": "Ada",
    "old_target": "Rome",
    "aliases": ["Berne"],
    "rephrases": ["Ada's home is"],
    "locality": {"near": [{"prompt": "Ben lives in", "answers": ["Basel"]}, "Cid lives in"]},
    "portability": [{"prompt": "Ada's country is", "answers": "Switzerland"}],
}
ONE = {
    "edits": (
        OWN,
        Edit(
            "Ada lives in",
            "Bern",
            "Ada",
            "Rome",
            ("Berne",),
            ("Ada's home is",),
            {"near": (Probe("Ben lives in", ("Basel",)), Probe("Cid lives in"))},
            {"other": (Probe("Ada's country is", ("Switzerland",)),)},
            "a",
        ),
    ),
    "counterfact": (
        COUNTERFACT,
        Edit(
            "The mother tongue of Ada is",
            "English",
            "Ada",
            "French",
            rephrases=("Ada speaks",),
            locality={"neighborhood": (Probe("Ben is a native speaker of", ("French",)),)},
            id="7",
        ),
    ),
    "counterfact_nested": (
        NESTED,
        Edit(
            "The mother tongue of Ada is",
            "English",
            "Ada",
            "French",
            rephrases=("Ada speaks", "Ada grew up with"),
            locality={"neighborhood": (Probe("Ben speaks", ("French",)), Probe("Cid speaks", ("French",)))},
            id="3",
        ),
    ),
    "zsre": (
        ZSRE,
        Edit(
            "What does UniFirst make?",
            "aircraft",
            "UniFirst",
            "uniforms",
            rephrases=("What is UniFirst's product?",),
            locality={"natural_questions": (Probe("who wrote it?", ("Someone",)),)},
        ),
    ),
    "knowedit": (
        KNOWEDIT,
        Edit(
            "The gender of Ada is",
            "female",
            "Ada",
            "male",
            rephrases=("What is Ada's gender?",),
            locality={
                "Relation_Specificity": (Probe("Ada was born in", ("Rome", "Roma", "Urbs")), Probe("Ada's father is")),
                "Forgetfulness": (Probe("Ada is", ("a poet", "a nun")),),
            },
            portability={"Reasoning": (Probe("Ada's son calls her", ("mother",)),)},
        ),
    ),
    "wikibigedit": (
        WIKIBIGEDIT,
        Edit(
            "Who leads Ada's town?",
            "Ben",
            "Ada",
            rephrases=("Who is at the head of Ada's town?", "Mate, who leads Ada's town?"),
            locality={"unrelated": (Probe("Who leads Basel?", ("Cid",)),)},
            portability={"multi_hop": (Probe("Where was the leader of Ada's town born?", ("Bern",)),)},
        ),
    ),
    "qaedit": (
        QAEDIT,
        Edit(
            "who wrote it?",
            "Ben",
            "it",
            rephrases=("by whom was it written?",),
            locality={"unrelated": tuple(Probe(f"question {i}?", (f"answer {i}",)) for i in range(5))},
            id="q-1",
        ),
    ),
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".data.json"])
def test_a_record_of_each_format_becomes_its_edit(name: str, suffix: str, tmp_path: Path) -> None:
    record, edit = ONE[name]
    path = tmp_path / f"facts{suffix}"
    text = json.dumps({"version": 1, "data": [record]} if suffix == ".data.json" else [record])
    path.write_text(json.dumps(record) + "\n\n" if suffix == ".jsonl" else text)
    edits = EditDataset.load(path)
    assert list(edits) == [edit]
    assert (edits.format, edits.name, edits.skipped) == (name, path.name, ())
    assert list(EditDataset.load(path, format=name)) == [edit]


def test_mquake_has_one_edit_per_rewrite_and_its_multi_hop_questions_once() -> None:
    one = {**MQUAKE, "case_id": 10, "requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    edits = EditDataset.from_records([MQUAKE, one])
    assert edits.format == "mquake"
    right = ("Split", "Spalato")
    hops = tuple(Probe(text, right) for text in MQUAKE["questions"])
    assert list(edits) == [
        Edit("Ada is a citizen of", "Croatia", "Ada", "USA", rephrases=("What is Ada a citizen of?",), id="9-1"),
        Edit(
            "The capital of Croatia is",
            "Split",
            "Croatia",
            "Zagreb",
            rephrases=("What is Croatia's capital?",),
            portability={"multi_hop_edits_2": hops},
            id="9-2",
        ),
        Edit(
            "Ada is a citizen of",
            "Croatia",
            "Ada",
            "USA",
            rephrases=("What is Ada a citizen of?",),
            portability={"multi_hop_edits_1": hops},
            id="10",
        ),
    ]


def test_limit_counts_the_records_of_mquake(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps([MQUAKE] * 3))
    with pytest.warns(UserWarning, match="2 of 4 edits repeat an earlier edit"):
        assert len(EditDataset.load(path, limit=2)) == 4


def test_wikibigedit_is_read_with_its_long_field_names() -> None:
    names = {"update": "prompt", "ans": "target_new", "rephrase": "rephrase_prompt"} | {
        "loc": "locality_prompt",
        "loc_ans": "locality_ground_truth",
    }
    record = {names.get(key, key): value for key, value in WIKIBIGEDIT.items()}
    edits = EditDataset.from_records([record])
    assert edits.format == "wikibigedit"
    assert edits[0] == ONE["wikibigedit"][1]


def test_counterfact_is_read_with_a_list_of_rephrases() -> None:
    record = {**COUNTERFACT, "rephrase_prompts": ["one", "two"], "relation": "P103"}
    del record["rephrase_prompt"]
    assert EditDataset.from_records([record])[0].rephrases == ("one", "two")


def test_only_the_prefix_of_natural_questions_is_removed() -> None:
    for loc, expected in [("Who leads Basel", "Who leads Basel"), ("nq question: who leads?", "who leads?")]:
        probe = EditDataset.from_records([{**ZSRE, "loc": loc}])[0].locality["natural_questions"][0]
        assert probe.prompt == expected


@pytest.mark.parametrize("name", ["counterfact", "zsre", "knowedit", "wikibigedit", "qaedit", "edits"])
def test_optional_fields_may_be_missing_null_or_blank(name: str) -> None:
    record, edit = ONE[name]
    needed = {"prompt", "target_new", "target", "src", "alt", "update", "ans"}
    # The format is named, because the fields that distinguish it are blank.
    for rest in (None, "", "  "):
        bare = {key: value if key in needed else rest for key, value in record.items()}
        edits = EditDataset.from_records([bare], format=name)
        assert list(edits) == [Edit(edit.prompt, edit.target)], rest
    bare = {key: value for key, value in record.items() if key in needed}
    assert list(EditDataset.from_records([bare], format=name)) == [Edit(edit.prompt, edit.target)]


def test_a_probe_without_its_answer_is_kept_and_an_answer_without_its_question_is_an_error() -> None:
    record = {**COUNTERFACT, "locality_ground_truth": None}
    assert EditDataset.from_records([record])[0].locality == {"neighborhood": (Probe("Ben is a native speaker of"),)}
    with pytest.raises(EditError, match=r"records, record 1: field 'locality_prompt' must be text, got null"):
        EditDataset.from_records([{**COUNTERFACT, "locality_prompt": None}])


def test_a_datasets_dataset_is_read() -> None:
    import datasets

    records = [KNOWEDIT, {"prompt": "p", "target_new": "t", "locality": {"Forgetfulness": []}}]
    flat = [{**COUNTERFACT}, {**COUNTERFACT, "rephrase_prompt": None}]
    edits = EditDataset.from_records(datasets.Dataset.from_list(flat), name="flat")
    assert [edit.rephrases for edit in edits] == [("Ada speaks",), ()]
    assert (edits.name, edits.format) == ("flat", "counterfact")
    assert EditDataset.from_records(records).format == "knowedit"
