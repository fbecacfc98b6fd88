"""Texts are read from files, lists and data sets; a source that cannot be read is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_train.core.locality.texts import Texts
from kedit_train.errors import EditError

TEXTS = ["The sky is blue.", "Grass\u2028is green.", "Snöw: 雪"]


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n".join([TEXTS[0], "", TEXTS[1], "   ", TEXTS[2], ""])),
        ("b.txt", "\ufeff" + "\r\n".join(TEXTS)),
        ("a.jsonl", "\n".join(json.dumps(text, ensure_ascii=False) for text in TEXTS) + "\n\n"),
        ("b.jsonl", "\n".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in TEXTS)),
        ("a.json", json.dumps(TEXTS)),
        ("b.json", json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1)),
        ("a.csv", "id, text\n" + "\n".join(f'{n},"{text}"' for n, text in enumerate(TEXTS)) + '\n3,""\n'),
        ("A.JSONL", "\n".join(json.dumps(text, ensure_ascii=False) for text in TEXTS)),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_files_of_each_kind(tmp_path, name, content, kind):
    assert Texts(kind(written(tmp_path / name, content))).load() == TEXTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,id\na,1\n", "must have a column \"text\", got the columns 'prompt', 'id'; rename one column"),
        (
            "The sky is blue.\nGrass is green.\n",
            "got the columns 'The sky is blue.'; .* ending of the file name to .txt",
        ),
        ("text,id\na,1\nb\n", r"record 2 \(line 3\): the row must have 2 cells, got 1 .*; correct this row\.$"),
        ("text,text\na,b\n", "the column 'text' appears twice"),
        ("text\n", "contains no text"),
        ("\n", "contains no text"),
    ],
)
def test_a_csv_file_without_texts_is_an_error(tmp_path, content, message):
    with pytest.raises(EditError, match=message) as error:
        Texts(written(tmp_path / "a.csv", content)).check()
    assert "\n" not in str(error.value)


def test_a_json_file_with_a_single_record(tmp_path):
    assert Texts(written(tmp_path / "a.json", '{"text": "One."}')).load() == ["One."]


@pytest.mark.parametrize("source", [TEXTS, tuple(TEXTS), [{"text": text} for text in TEXTS], [*TEXTS, "", " \n"]])
def test_lists_of_texts(source):
    assert Texts(source).load() == TEXTS


def test_a_dataset_needs_a_column_text():
    datasets = pytest.importorskip("datasets")
    assert Texts(datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]})).load() == TEXTS
    with pytest.raises(EditError) as error:
        Texts(datasets.Dataset.from_dict({"prompt": TEXTS, "id": [1, 2, 3]})).check()
    assert str(error.value) == (
        'the dataset must have a column "text" or "messages", got the columns prompt, id; rename one column to "text".'
    )


def test_the_embedded_world():
    texts = Texts("world").load()
    assert len(texts) > 50
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "texts contains no text; pass texts on which the model should not change."),
        (["", "  "], "texts contains no text; pass texts on which the model should not change."),
        (["\u200b", "\ufeff \u2800"], "texts contains no text; pass texts on which the model should not change."),
        (
            [{"messages": [{"role": "user", "content": "\u200b"}]}],
            "texts contains no text; pass texts on which the model should not change.",
        ),
        (
            ["a", 3],
            'texts, record 2: expected a string, or a record with a string "text" or a list "messages", got 3; '
            "correct this record.",
        ),
        (
            [{"prompt": "a"}],
            'texts, record 1: expected a string, or a record with a string "text" or a list "messages", got '
            "{'prompt': 'a'}; correct this record.",
        ),
        (
            None,
            "texts must be a list of strings, a path or a dataset, got None; give texts on which "
            "predictions should stay the same.",
        ),
        (
            5,
            "texts must be a list of strings, a path or a dataset, got 5; give texts on which "
            "predictions should stay the same.",
        ),
        (
            {"text": ["a"]},
            "texts must be a list of strings, a path or a dataset, got {'text': ['a']}; give texts on which "
            "predictions should stay the same.",
        ),
        (
            "The sky is blue.",
            "file 'The sky is blue.' does not exist or cannot be read; pass the path of a .txt, "
            ".jsonl, .json or .csv file, or a list of texts.",
        ),
    ],
)
def test_an_invalid_source_is_an_error(source, message):
    with pytest.raises(EditError) as error:
        Texts(source).check()
    assert str(error.value) == message


def test_a_long_text_is_not_taken_for_a_path():
    with pytest.raises(EditError, match=r"^file 'word word .*; pass the path of a \.txt"):
        Texts("word " * 2000).check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "{path} contains no text; pass texts on which the model should not change."),
        ("a.txt", b"caf\xe9", "{path} must be a UTF-8 text file: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        ("a.json", b'["a",', "{path} must be valid JSON: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "{path}, line 3 must be valid JSON: Expecting ',' delimiter"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"tekst": "b"}\n',
            '{path}, record 2: expected a string, or a record with a string "text"',
        ),
        ("a.json", b"[" * 100_000, "{path} must be valid JSON: it is nested too deeply"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "{path} must be valid JSON: a number has too many digits"),
        ("a.json", b'["\\ud800"]', "{path}, record 1 must be valid Unicode"),
    ],
)
def test_unreadable_files_are_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EditError) as error:
        Texts(path).check()
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)
