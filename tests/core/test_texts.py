"""Texts to keep: from wherever they are, none lost, none that the edit is scored on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kedit_train.core.locality.texts import load_texts, pad, windows, without_probes
from kedit_train.data import Edit, Probe
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
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_files(tmp_path, name, content, kind):
    assert load_texts(kind(written(tmp_path / name, content))) == TEXTS


def test_one_record_in_a_json_file(tmp_path):
    assert load_texts(written(tmp_path / "a.json", '{"text": "One."}')) == ["One."]


@pytest.mark.parametrize("source", [TEXTS, tuple(TEXTS), [{"text": text} for text in TEXTS], [*TEXTS, "", " \n"]])
def test_sequences(source):
    assert load_texts(source) == TEXTS


def test_datasets():
    datasets = pytest.importorskip("datasets")
    assert load_texts(datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]})) == TEXTS
    with pytest.raises(EditError) as error:
        load_texts(datasets.Dataset.from_dict({"prompt": TEXTS, "id": [1, 2, 3]}))
    assert str(error.value) == "KLLocality: the dataset has no column 'text' (it has prompt, id)"


def test_the_embedded_world():
    texts = load_texts("world")
    assert len(texts) > 50
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "KLLocality: texts holds no text; give some that the model should answer as before"),
        (["", "  "], "KLLocality: texts holds no text; give some that the model should answer as before"),
        (["a", 3], "KLLocality: texts, record 2: expected a text or a record with 'text', got 3"),
        (
            [{"prompt": "a"}],
            "KLLocality: texts, record 1: expected a text or a record with 'text', got {'prompt': 'a'}",
        ),
        (None, "KLLocality: texts=None is no list of texts, path or dataset"),
        (5, "KLLocality: texts=5 is no list of texts, path or dataset"),
        ({"text": ["a"]}, "KLLocality: texts={'text': ['a']} is no list of texts, path or dataset"),
        (
            "The sky is blue.",
            "KLLocality: no file 'The sky is blue.'; give a path to .txt, .jsonl or .json, or a list of texts",
        ),
    ],
)
def test_what_is_no_texts(source, message):
    with pytest.raises(EditError) as error:
        load_texts(source)
    assert str(error.value) == message


def test_a_long_text_in_place_of_a_path():
    with pytest.raises(EditError, match=r"^KLLocality: no file 'word word .*; give a path to \.txt"):
        load_texts("word " * 2000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "{path} holds no text; give some that the model should answer as before"),
        ("a.txt", b"caf\xe9", "{path} cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        ("a.json", b'["a",', "{path} cannot be read: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "{path}, line 3 cannot be read: Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "a"}\n{"tekst": "b"}\n', "{path}, record 2: expected a text or a record with 'text'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EditError) as error:
        load_texts(path)
    assert str(error.value).startswith("KLLocality: " + message.format(path=path))
    assert "\n" not in str(error.value)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", model_max_length=4)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 11])
def test_windows_lose_nothing(length):
    texts = ["a b c d e f g h i j", "a", "b c d"]
    whole = tokenizer()(texts)["input_ids"]
    cut = windows(tokenizer(), texts, length)
    assert all(0 < len(row) <= length for row in cut)
    assert [i for row in cut for i in row] == [i for row in whole for i in row]
    assert len(cut) == sum(-(-len(row) // length) for row in whole), "no window spans two texts"


def test_texts_without_tokens_are_an_error():
    with pytest.raises(EditError) as error:
        windows(lambda texts, truncation: {"input_ids": [[] for _ in texts]}, ["? !", "."], 8)
    assert str(error.value) == "KLLocality: the tokenizer makes no token of any of the 2 texts; give others"


def test_padding():
    ids, mask = pad([[0, 5], [7], [1, 2, 3]], pad_id=0)
    assert ids.tolist() == [[0, 5, 0], [7, 0, 0], [1, 2, 3]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


EDIT = Edit(
    prompt="The capital of France is",
    target="Lyon",
    rephrases=("France's capital:",),
    locality={"neighbours": (Probe("The capital of Spain is", ("Madrid",)),)},
    portability={"hops": (Probe("The mayor of France's capital is", ("Ann",)),)},
)


def test_what_the_edit_is_scored_on_is_left_out_with_the_count():
    kept = ["The sky is blue.", "Spain is sunny."]
    held = [
        "The capital of France is Paris.",
        "Q: France's capital: Paris",
        "The capital of Spain is Madrid",
        "Well. The mayor of France's capital is Ann.",
    ]
    with pytest.warns(UserWarning, match=re.escape("KLLocality: 4 of 6 texts hold a prompt that the edits are scored")):
        assert without_probes([kept[0], *held, kept[1]], [EDIT]) == kept


@pytest.mark.filterwarnings("ignore:KLLocality. 1 of 1:UserWarning")
def test_nothing_left():
    with pytest.raises(EditError) as error:
        without_probes(["The capital of France is Paris."], [EDIT])
    assert str(error.value) == ("KLLocality: every text holds a prompt that the edits are scored on; give other texts")


@pytest.mark.parametrize("edits", [[], [EDIT]])
def test_without_leaks_there_is_no_warning(edits):
    assert without_probes(TEXTS, edits) == TEXTS
