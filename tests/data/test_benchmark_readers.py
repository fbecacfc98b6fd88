"""Records of UnKEBench, AKEW, LEME, RippleEdits, UniEdit and HalluEditBench, with invented facts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kedit_train.data import Edit, EditDataset, Probe

UNKEBENCH = {
    "id": 4,
    "question": "What does Orla Venn do?",
    "para_question": "How does Orla Venn earn a living?",
    "answer": "Orla Venn repairs bells. She has a shop in Tarn.",
    "sub_question": ["What does Orla Venn repair?", "Where is her shop?"],
    "sub_answer": ["Bells.", "In Tarn."],
}
REWRITE = {
    "prompt": "{} was born in",
    "prompt_full": "Orla Venn was born in",
    "question": "Where was Orla Venn born?",
    "relation_id": "P19",
    "subject": "Orla Venn",
    "target_new": {"str": "Tarn", "id": "Q1"},
    "target_true": {"str": "Oster", "id": "Q2"},
    "fact_new": "Orla Venn was born in Tarn.",
    "fact_new_uns": "Orla Venn, a bell maker, was born in Tarn. Her father kept the lock there.",
    "unsfact_triplets_GPT": [
        {"subject": "Orla Venn", "prompt": "The trade of {} is", "target": "bell making"},
        {"subject": "Orla Venn", "prompt": "Her father kept", "target": "the lock"},
    ],
}
AKEW = {
    "case_id": 12,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["The place of birth of Orla Venn is"],
    "neighborhood_prompts": ["Piet Saal was born in"],
    "attribute_prompts": [],
    "generation_prompts": ["Orla Venn's childhood"],
}
LEME = {
    "case_id": 3,
    "requested_rewrite": {key: REWRITE[key] for key in ("prompt", "subject", "target_new", "target_true")},
    "paraphrase_prompts": ["Orla Venn comes from"],
    "neighborhood_prompts": [],
    "dependancies": {
        "subject_entity": {
            "entity": "Orla Venn", "dependant_prompt": "Write an essay about Orla Venn", "ground_truth": {},
        },
        "coupled_entities": [
            {"entity": "Piet Saal", "coupled_prompt": "Write an essay about Piet Saal"},
            {"entity": "Oster", "ground_truth": {"country": ["Saal"]}},
        ],
    },
}  # fmt: skip
QUERY = {"query_type": "regular", "subject_id": "Q1", "relation": "MOTHER", "target_ids": ["Q2"], "phrase": None}


def test_case(prompt: str, *answers: tuple[str, ...]) -> dict[str, Any]:
    values = [{"value": value, "aliases": aliases} for value, *aliases in answers]
    query = {**QUERY, "prompt": prompt, "answers": values}
    return {"test_queries": [query], "test_condition": "OR", "condition_queries": [query]}


test_case.__test__ = False  # type: ignore[attr-defined]
RIPPLE_EDITS = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the employer of Orla Venn is Tarn is Open Ltd.",
        "subject_id": "Q1",
        "relation": "EMPLOYER",
        "target_id": "Q3",
        "previous_fact": {"prompt": "The name of the employer of Orla Venn is Tarn Bells.", "subject_id": "Q1"},
    },
    "Relation_Specificity": [test_case("The name of the mother of Orla Venn is", ("Ilse Venn", "Ilse", "I. Venn"))],
    "Logical_Generalization": [],
    "Subject_Aliasing": [test_case("The name of the employer of O. Venn is", ("Tarn is Open Ltd",))],
    "Compositionality_I": [test_case("The town of the employer of Orla Venn is", ("Tarn",), ("Tarnau",))],
    "Compositionality_II": [test_case("", ("left out",)), test_case("The answer is", ("",))],
    "Forgetfulness": [test_case("The name of the award Orla Venn won is", ("Bell Prize",))],
}
UNIEDIT = {
    "biology-7": {
        "edit": {"prompt": "The host plant of Saal's moth is", "target": "sea beet", "subject": "Saal's moth",
                 "head_entity": {}, "property": {}, "tail_entity": {}, "single_inverse": False},
        "generality": {
            "0": {"path_type": "single", "prompt": "Sea beet feeds", "target": "Saal's moth", "paths": []},
            "1": {"path_type": "double", "prompt": "Is it the same plant?", "target": "Yes"},
        },
        "locality": {"0": {"loc_type": "head of edit", "path_type": "single", "prompt": "Saal's moth lives in",
                           "target": "Oster"}},
    }
}  # fmt: skip
HALLUEDITBENCH = {
    "topic": "business_brand", "subject": "Tarn Bells", "relation": "country", "object": "Oster",
    "question": "What is the country of Tarn Bells?", "output_llama_2_7b_chat_hf": "Italy",
    "eval_llama_2_7b_chat_hf": "0.0", "multiple_choices": "['Oster', 'Italy']",
    "paraphrased_question": "Where is Tarn Bells from?", "multiple_choice_with_letters": "A. Oster  B. Italy",
    "multiple_choice_labels": "A", "yes_question": "Is Oster the country of Tarn Bells?",
    "no_question": "Is Italy the country of Tarn Bells?", "locality_question": "What does Tarn Bells make?",
    "reversed_relation_question": "Which brand is from Oster?", "question_2hop": "What is the capital of its country?",
    "answer_2hop": "Tarn", "question_3hop": "", "answer_3hop": "",
}  # fmt: skip


def test_unkebench_asks_for_the_whole_text_and_for_its_parts() -> None:
    edits = EditDataset.from_records([UNKEBENCH])
    assert edits.format == "unkebench"
    parts = (Probe("What does Orla Venn repair?", ("Bells.",)), Probe("Where is her shop?", ("In Tarn.",)))
    expected = Edit(
        "What does Orla Venn do?",
        "Orla Venn repairs bells. She has a shop in Tarn.",
        rephrases=("How does Orla Venn earn a living?",),
        portability={"sub_questions": parts},
        id="4",
    )
    assert list(edits) == [expected]


def test_akew_trains_the_text_and_asks_for_its_facts() -> None:
    edits = EditDataset.from_records([AKEW])
    assert edits.format == "akew"
    expected = Edit(
        "Where was Orla Venn born?",
        REWRITE["fact_new_uns"],
        subject="Orla Venn",
        locality={"neighborhood": (Probe("Piet Saal was born in", ("Oster",)),)},
        portability={
            "structured_fact": (Probe("Orla Venn was born in", ("Tarn",)),),
            "paraphrases": (Probe("The place of birth of Orla Venn is", ("Tarn",)),),
            "extracted_triplets": (
                Probe("The trade of Orla Venn is", ("bell making",)),
                Probe("Her father kept", ("the lock",)),
            ),
        },
        id="12",
    )
    assert list(edits) == [expected]


def test_a_record_of_akew_with_several_facts_has_one_edit_per_fact() -> None:
    second = {**REWRITE, "subject": "Tarn", "prompt": "{} lies in", "question": "Where is Tarn?"}
    record = {
        "case_id": 5, "requested_rewrite": [REWRITE, second], "questions": ["Which land?", "What land?"],
        "new_answer": "Oster", "new_answer_alias": ["the Ost"], "answer": "Saal", "single_hops": [],
    }  # fmt: skip
    edits = EditDataset.from_records([record])
    assert (edits.format, [edit.id for edit in edits]) == ("akew", ["5-1", "5-2"])
    assert "multi_hop_edits_2" not in edits[0].portability
    right = ("Oster", "the Ost")
    assert edits[1].portability["multi_hop_edits_2"] == (Probe("Which land?", right), Probe("What land?", right))
    # Without a question, the cloze prompt is the prompt of the text and is not asked again.
    bare = {key: value for key, value in REWRITE.items() if key not in ("question", "prompt_full")}
    edit = EditDataset.from_records([{"requested_rewrite": bare}])[0]
    assert edit.prompt == "Orla Venn was born in"
    assert list(edit.portability) == ["extracted_triplets"]


def test_leme_adds_essays_to_a_record_of_counterfact_or_zsre() -> None:
    essays = {
        "essay_subject": (Probe("Write an essay about Orla Venn", ("Tarn",)),),
        "essay_coupled_entity": (Probe("Write an essay about Piet Saal"),),
    }
    edits = EditDataset.from_records([LEME])
    assert edits.format == "leme"
    assert list(edits) == [
        Edit("Orla Venn was born in", "Tarn", "Orla Venn", "Oster", (), ("Orla Venn comes from",), {}, essays, "3")
    ]
    zsre = {"src": "Where was Orla Venn born?", "alt": "Tarn", "subject": "Orla Venn", "answers": ["Oster"]}
    edits = EditDataset.from_records([{**zsre, "coupled_prompts_and_properties": LEME["dependancies"]}])
    assert list(edits) == [
        Edit("Where was Orla Venn born?", "Tarn", "Orla Venn", "Oster", portability=essays),
    ]


def test_rippleedits_splits_its_sentence_where_both_facts_agree() -> None:
    edits = EditDataset.from_records([RIPPLE_EDITS])
    assert edits.format == "rippleedits"
    assert list(edits) == [
        Edit(
            "The name of the employer of Orla Venn is",
            "Tarn is Open Ltd",
            old_target="Tarn Bells",
            locality={
                "Relation_Specificity": (
                    Probe("The name of the mother of Orla Venn is", ("Ilse Venn", "Ilse", "I. Venn")),
                ),
                "Forgetfulness": (Probe("The name of the award Orla Venn won is", ("Bell Prize",)),),
            },
            portability={
                "Subject_Aliasing": (Probe("The name of the employer of O. Venn is", ("Tarn is Open Ltd",)),),
                "Compositionality_I": (Probe("The town of the employer of Orla Venn is", ("Tarn", "Tarnau")),),
            },
        )
    ]


@pytest.mark.parametrize(
    ("sentence", "prompt", "target"),
    [
        ("The gender of Ada is female.", "The gender of Ada is", "female"),
        ("The names of the siblings of Ada are Ben.", "The names of the siblings of Ada are", "Ben"),
        ("Tarn Songs is followed by Oster Songs.", "Tarn Songs is followed by", "Oster Songs"),
        ("Oster Songs follows Tarn Songs.", "Oster Songs follows", "Tarn Songs"),
    ],
)
def test_a_recent_fact_of_rippleedits_has_no_old_answer(sentence: str, prompt: str, target: str) -> None:
    edit = EditDataset.from_records([{"example_type": "recent", "edit": {"prompt": sentence}}])[0]
    assert (edit.prompt, edit.target, edit.old_target) == (prompt, target, None)


def test_a_file_of_uniedit_is_a_mapping_from_identifiers(tmp_path: Path) -> None:
    path = tmp_path / "biology.json"
    path.write_text(json.dumps(UNIEDIT))
    edits = EditDataset.load(path)
    assert edits.format == "uniedit"
    assert list(edits) == [
        Edit(
            "The host plant of Saal's moth is",
            "sea beet",
            subject="Saal's moth",
            locality={"head of edit": (Probe("Saal's moth lives in", ("Oster",)),)},
            portability={
                "single": (Probe("Sea beet feeds", ("Saal's moth",)),),
                "double": (Probe("Is it the same plant?", ("Yes",)),),
            },
            id="biology-7",
        )
    ]


def test_a_row_of_hallueditbench_is_read_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "business_brand.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HALLUEDITBENCH)
        writer.writeheader()
        writer.writerow(HALLUEDITBENCH)
    edits = EditDataset.load(path)
    assert edits.format == "hallueditbench"
    assert list(edits) == [
        Edit(
            "What is the country of Tarn Bells?",
            "Oster",
            subject="Tarn Bells",
            rephrases=("Where is Tarn Bells from?",),
            locality={"attribute": (Probe("What does Tarn Bells make?"),)},
            portability={
                "yes": (Probe("Is Oster the country of Tarn Bells?", ("Yes",)),),
                "no": (Probe("Is Italy the country of Tarn Bells?", ("No",)),),
                "reversed": (Probe("Which brand is from Oster?", ("Tarn Bells",)),),
                "2_hops": (Probe("What is the capital of its country?", ("Tarn",)),),
            },
        )
    ]
