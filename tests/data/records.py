"""A good record of each format, and the message of a file that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kedit_train.data import EditDataset
from kedit_train.errors import EditError

REST = '; correct the record, or pass on_error="skip" to leave out records with errors'
GOOD = {
    "edits": {"prompt": "p", "target": "t"},
    "counterfact": {"prompt": "p", "target_new": "t", "ground_truth": "o"},
    "zsre": {"src": "p", "alt": "t"},
    "knowedit": {"prompt": "p", "target_new": "t", "locality": {"k": [{"prompt": "q", "ground_truth": "a"}]}},
    "qaedit": {"prompt": "p", "target": "t", "rephrase": "r", "locality": [{"loc": "q", "loc_ans": "a"}]},
    "wikibigedit": {"update": "p", "ans": "t"},
    "counterfact_nested": {
        "requested_rewrite": {"prompt": "{} is", "subject": "S", "target_new": {"str": "t"}},
        "paraphrase_prompts": ["r"],
    },
    "mquake": {
        "requested_rewrite": [{"prompt": "{} is", "subject": "S", "target_new": {"str": "t"}}],
        "questions": ["q"],
        "new_answer": "a",
    },
    "documents": {"title": "p", "text": "t", "questions": [{"prompt": "q", "answers": ["a"]}]},
    "unkebench": {"question": "p", "answer": "t", "sub_question": ["q"], "sub_answer": ["a"]},
    "akew": {
        "requested_rewrite": {
            "prompt": "{} is", "subject": "S", "target_new": {"str": "t"}, "question": "p", "fact_new_uns": "text",
            "unsfact_triplets_GPT": [{"subject": "S", "prompt": "{} has", "target": "a"}],
        },
    },
    "leme": {
        "requested_rewrite": {"prompt": "{} is", "subject": "S", "target_new": {"str": "t"}},
        "dependancies": {"subject_entity": {"dependant_prompt": "essay"}, "coupled_entities": []},
    },
    "rippleedits": {
        "edit": {"prompt": "The gender of S is t."},
        "Forgetfulness": [{"test_queries": [{"prompt": "q", "answers": [{"value": "a", "aliases": []}]}]}],
    },
    "uniedit": {"edit": {"prompt": "p", "target": "t"}, "locality": {"a": {"loc_type": "none", "prompt": "q", "target": "a"}}},  # noqa: E501
    "hallueditbench": {"question": "p", "object": "t", "question_2hop": "q", "answer_2hop": "a"},
}  # fmt: skip


def raised(path: Path, **options: Any) -> str:
    with pytest.raises(EditError) as caught:
        EditDataset.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
