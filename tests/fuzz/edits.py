"""Fuzzers of the files that users bring: edits in every format and container, and texts."""

from __future__ import annotations

import csv
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.harness import Fuzzer, use_or_refuse
from fuzz.text_mutations import copied, with_bytes, with_values

from kedit_train import EditDataset, world
from kedit_train.core.locality.texts import Texts
from kedit_train.data.leaks import LeakCheck
from kedit_train.data.readers.files import LIST_KEYS

PROBES = [
    {"prompt": "Ben was born in", "ground_truth": [["Rome", "Roma"], []]},
    {"prompt": "Who is Ben?", "ground_truth": "a poet"},
]
REWRITE = {
    "prompt": "The mother tongue of {} is",
    "subject": "Ada",
    "target_new": {"str": "English", "id": "Q1860"},
    "target_true": {"str": "French"},
}
RECORDS: dict[str, dict[str, Any]] = {
    "edits": {
        "id": 7,
        "prompt": "Ada lives in",
        "target": "Bern",
        "subject": "Ada",
        "old_target": "Rome",
        "aliases": ["Berne"],
        "rephrases": ["Ada's home is", "Where is Ada?"],
        "locality": {"near": [{"prompt": "Ben lives in", "answers": ["Basel"]}, "Cid lives in"]},
        "portability": [{"prompt": "Ada's country is", "answers": []}],
    },
    "counterfact": {
        "case_id": 7,
        "prompt": "The mother tongue of Ada is",
        "target_new": " English ",
        "ground_truth": "French",
        "subject": "Ada",
        "rephrase_prompt": "Ada speaks",
        "locality_prompt": "Ben is a native speaker of",
        "locality_ground_truth": "French",
    },
    "counterfact_nested": {
        "case_id": 3,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Ada speaks", "Ada grew up with"],
        "neighborhood_prompts": ["Ben speaks"],
        "generation_prompts": ["Ada was at home when"],
    },
    "zsre": {
        "subject": "Ada",
        "src": "What does Ada make?",
        "rephrase": "What is Ada's product?",
        "alt": " aircraft",
        "answers": ["uniforms", "clothes"],
        "loc": "nq question: who wrote it",
        "loc_ans": "Someone",
        "pred": "cloth",
    },
    "knowedit": {
        "subject": "Ada",
        "prompt": "The gender of Ada is",
        "target_new": "female",
        "ground_truth": [["male", "man"]],
        "locality": {"Relation_Specificity": PROBES, "Forgetfulness": []},
        "portability": {"Reasoning": PROBES[1:], "Subject_Aliasing": None},
    },
    "wikibigedit": {
        "subject": "Ada",
        "update": "Who leads Ada's town?",
        "rephrase": "Who is at the head of Ada's town?",
        "personas": "Mate, who leads Ada's town?",
        "ans": "Ben",
        "mhop": "Where was the leader of Ada's town born?",
        "mhop_ans": "Bern",
        "loc": "Who leads Basel?",
        "loc_ans": "Cid",
    },
    "qaedit": {
        "id": 5,
        "prompt": "Where is Ada?",
        "target": "Bern",
        "subject": "Ada",
        "rephrase": ["Ada is where?"],
        "source": "nq",
        "locality": [{"loc": "nq question: who is Ben", "loc_ans": ["a poet"]}],
    },
    "mquake": {
        "case_id": 1,
        "requested_rewrite": [REWRITE, {**REWRITE, "prompt": "{} lives in", "question": "Where does Ada live?"}],
        "questions": ["In which language does Ada's town speak?", "What does one speak there?"],
        "new_answer": "English",
        "new_answer_alias": ["Anglais"],
    },
}  # fmt: skip
KEYS = sorted({key for record in RECORDS.values() for key in record})


def records_of(form: str) -> list[dict[str, Any]]:
    """Return three records that differ in all their texts."""
    return [RECORDS[form], *(json.loads(json.dumps(RECORDS[form]).replace("Ada", name)) for name in ("Eva", "Udo"))]


def write(records: list[Any], file: str, draw: random.Random) -> bytes:
    """Write records as JSON, JSONL or CSV, in one of several layouts."""
    ascii_only = draw.random() < 0.7
    text = ""
    if file.endswith(".jsonl"):
        end = draw.choice(["\n", "\n", "\r\n", "\n\n"])
        text = end.join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    elif file.endswith(".json"):
        whole = draw.choice([records, records, {"data": records}, {"edits": records, "x": 1}])
        text = json.dumps(whole, ensure_ascii=ascii_only, indent=draw.choice([None, 1]))
    else:
        mappings = [record for record in records if isinstance(record, dict)]
        names = list(dict.fromkeys(name for record in mappings for name in record))
        target = io.StringIO()
        rows = csv.writer(target, quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        rows.writerow(names)
        rows.writerows([cell(record.get(name, ""), draw) for name in names] for record in mappings)
        text = target.getvalue()
    return text.encode("utf-8", "surrogatepass")


def cell(value: Any, draw: random.Random) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value) and draw.random() < 0.5:
        return " | ".join(value)
    return json.dumps(value)


def fuzzer_of_edits(form: str, file: str) -> Fuzzer:
    """Return the fuzzer of one format in one kind of file."""
    records = records_of(form)

    def make(draw: random.Random) -> bytes:
        tokenizer()  # It is loaded here, because loading it does not count as time for a file.
        changed: Any = copied(records)
        if draw.random() < 0.7:
            if draw.random() < 0.9:
                i = draw.randrange(len(changed))
                changed[i] = with_values(changed[i], draw, others=[*KEYS, *RECORDS.values()])
            else:
                changed = with_values(changed, draw, others=list(RECORDS.values()))
            content = write(changed if isinstance(changed, list) else [changed], file, draw)
            return content if draw.random() < 0.8 else with_bytes(content, draw)
        return with_bytes(write(changed, file, draw), draw, tokens=[b'{"prompt": "a"}', b"[" * 2000, b'{"a":' * 300])

    @cache
    def unchanged() -> dict[str, Any]:
        """Return the edits of each unchanged record, by the JSON of the record."""
        return {key(record): list(EditDataset.from_records([record], format=form)) for record in records}

    def use(path: Path) -> bool:
        for options in ({"on_error": "skip"}, {"format": form, "limit": 2}):
            use_or_refuse(lambda options=options: check(EditDataset.load(path, **options), path, None, unchanged()))
        return check(EditDataset.load(path), path, form, unchanged())

    return Fuzzer(f"{form}{Path(file).suffix}", file, make, use)


def key(record: Any) -> str:
    return json.dumps(record, sort_keys=True)


def check(edits: EditDataset, path: Path, form: str | None, unchanged: dict[str, Any]) -> bool:
    """Use edits as a training does, and return whether they are those of the unchanged records.

    Raises:
        AssertionError: saving and loading changes the edits, or an edit differs from its record.
    """
    again = EditDataset.load(edits.save(path.with_name("again.jsonl")))
    assert list(again) == list(edits), "saving and loading changed the edits"
    assert again.hash == edits.hash
    assert "\n" not in repr(edits)
    uses = (
        lambda: edits.encode(tokenizer(), max_length=4096),
        lambda: edits.latest(),
        lambda: edits.to_old_targets(),
        lambda: LeakCheck(edits).contains_prompt("Ada lives in Bern."),
    )
    for each in uses:
        use_or_refuse(each)
    if form is None or edits.format != form:
        return False
    records = documents(path)
    made = [unchanged.get(key(record)) for record in records]
    if None not in made:
        expected = [edit for each in made for edit in each or ()]
        assert list(edits) == expected, "the records are unchanged, but the edits are not"
        return len(made) == len(unchanged)
    if len(records) == len(edits):
        for expected, edit in zip(made, edits, strict=True):
            assert expected is None or expected == [edit], "a record is unchanged, but its edit is not"
    return False


def documents(path: Path) -> list[Any]:
    """Return the records of a JSON or JSONL file as Python's ``json`` reads them, and an empty list for other files."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.suffix == ".json":
        whole = json.loads(text)
        return whole if isinstance(whole, list) else next(whole[k] for k in LIST_KEYS if isinstance(whole.get(k), list))
    return [None]


@cache
def tokenizer() -> Any:
    return world.load()[1]


FILES = ("edits.json", "edits.jsonl", "edits.csv")
EDITS = {(f := fuzzer_of_edits(form, file)).name: f for form in RECORDS for file in FILES}


def make_texts(draw: random.Random) -> bytes:
    texts: list[Any] = ["The sky is blue.", {"text": "Grass is green."}, "Ada lives in Bern."]
    if draw.random() < 0.6:
        texts = with_values(texts, draw, others=["text", {"text": 1}])
    lines = texts if isinstance(texts, list) else [texts]
    text = draw.choice([json.dumps(texts), "\n".join(map(json.dumps, lines)), "\n".join(map(str, lines))])
    content = text.encode("utf-8", "surrogatepass")
    return with_bytes(content, draw) if draw.random() < 0.5 else content


def use_texts(path: Path) -> bool:
    texts = Texts(path).load()
    assert texts
    assert all(isinstance(text, str) and text.strip() for text in texts)
    return False


TEXTS = {
    name: Fuzzer(name, name, make_texts, use_texts, refused=0) for name in ("texts.txt", "texts.json", "texts.jsonl")
}
