"""Texts: read from any source, split without loss, and without those that an edit is scored on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from yaml import safe_load

from kedit_train.callbacks import EditCallback
from kedit_train.core.host import Host
from kedit_train.core.locality.texts import Texts
from kedit_train.core.locality.token_sequences import pad_sequences
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
            'texts, record 2: expected a string or a record with "text" or "messages", got 3; correct this record.',
        ),
        (
            [{"prompt": "a"}],
            "texts, record 1: expected a string or a record with "
            "\"text\" or \"messages\", got {'prompt': 'a'}; correct this record.",
        ),
        (None, "texts must be a list of strings, a path or a dataset, got None."),
        (5, "texts must be a list of strings, a path or a dataset, got 5."),
        ({"text": ["a"]}, "texts must be a list of strings, a path or a dataset, got {'text': ['a']}."),
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
        ("a.jsonl", b'{"text": "a"}\n{"tekst": "b"}\n', '{path}, record 2: expected a string or a record with "text"'),
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


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", model_max_length=4)


def run_with(tokenizer: Any, edits: Sequence[Edit] = ()) -> Any:
    """The parts of an ``EditRun`` that ``Texts.tokenize`` reads."""
    model, host = torch.nn.Identity(), Host(object())
    return SimpleNamespace(edits=edits, model=model, host=host, tokenizer=lambda given: given or tokenizer)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 11])
def test_long_texts_are_split_without_loss(length):
    texts = ["a b c d e f g h i j", "a", "b c d"]
    whole = tokenizer()(texts)["input_ids"]
    cut = Texts(texts, max_length=length).tokenize(run_with(tokenizer()))
    assert all(0 < len(row) <= length for row in cut)
    assert [i for row in cut for i in row] == [i for row in whole for i in row]
    assert len(cut) == sum(-(-len(row) // length) for row in whole), "no sequence spans two texts"


def test_texts_without_tokens_are_an_error():
    with pytest.raises(EditError) as error:
        Texts(["? !", "."]).tokenize(run_with(lambda texts, truncation: {"input_ids": [[] for _ in texts]}))
    assert str(error.value) == "the tokenizer returns no token for any of the 2 texts; pass other texts."


def test_padding_is_on_the_right():
    ids, mask = pad_sequences([[0, 5], [7], [1, 2, 3]], pad_id=0)
    assert ids.tolist() == [[0, 5, 0], [7, 0, 0], [1, 2, 3]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


EDIT = Edit(
    prompt="The capital of France is",
    target="Lyon",
    rephrases=("France's capital:",),
    locality={"neighbours": (Probe("The capital of Spain is", ("Madrid",)),)},
    portability={"hops": (Probe("The mayor of France's capital is", ("Ann",)),)},
)


def test_texts_with_a_scored_prompt_are_left_out_with_a_warning():
    kept = ["The sky is blue.", "Spain is sunny."]
    held = [
        "The capital of France is Paris.",
        "Q: France's capital: Paris",
        "The capital of Spain is Madrid",
        "Well. The mayor of France's capital is Ann.",
    ]
    message = "4 of 6 texts contain an evaluation prompt of the edits (the first: 'The capital of France is Paris.')"
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert Texts([kept[0], *held, kept[1]]).load([EDIT]) == kept


@pytest.mark.filterwarnings("ignore:1 of 1:UserWarning")
def test_texts_that_are_all_leaks_are_an_error():
    with pytest.raises(EditError) as error:
        Texts(["The capital of France is Paris."]).load([EDIT])
    assert str(error.value) == (
        "every text contains an evaluation prompt of the edits, so no text is left; pass other texts."
    )


@pytest.mark.parametrize("edits", [[], [EDIT]])
def test_without_leaks_there_is_no_warning(edits):
    assert Texts(TEXTS).load(edits) == TEXTS


def test_case_and_white_space_do_not_hide_a_leak():
    texts = ["The sky is blue.", "FRANCE'S  capital: Paris"]
    with pytest.warns(UserWarning, match="1 of 2 texts contain an evaluation prompt"):
        assert Texts(texts).load([EDIT]) == texts[:1]


def test_texts_with_leaks_are_kept_on_request():
    texts = ["The capital of France is Paris."]
    assert Texts(texts).load([EDIT], keep_leaks=True) == texts


def test_an_iterator_is_read_once():
    texts = Texts(iter(TEXTS))
    assert texts.load() == texts.load() == TEXTS


def test_a_limit_draws_texts_with_the_seed():
    texts = [f"Text {n}." for n in range(50)]
    drawn = [Texts(texts, seed=seed).load(limit=10) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert Texts(texts).load(limit=50) == texts


def test_nearest_texts_are_chosen_for_the_edits():
    texts = ["The capital of Spain is big.", "Rain falls.", "Snow falls."]
    edit = Edit(prompt="The capital of France is", target="Lyon")
    assert Texts(texts, nearest=1).load([edit]) == texts[:1]


def test_the_tokenizer_of_texts_comes_before_that_of_the_run():
    run = run_with(lambda texts, truncation: {"input_ids": [[1] for _ in texts]})
    own = Texts(["a"], tokenizer=lambda texts, truncation: {"input_ids": [[2] for _ in texts]})
    assert Texts(["a"]).tokenize(run) == [[1]]
    assert own.tokenize(run) == [[2]]


def test_a_source_becomes_texts():
    texts = Texts("keep.txt", max_length=8)
    assert Texts.of(texts) is texts
    assert Texts.of("keep.txt") == Texts("keep.txt")
    assert Texts.of({"source": "keep.txt", "max_length": 8}) == texts
    assert Texts.of("keep.txt", max_length=8) == texts
    with pytest.raises(EditError) as error:
        Texts.of({"source": "keep.txt", "length": 8})
    assert str(error.value) == (
        "Texts: unknown argument 'length'; use only source, max_length, nearest, tokenizer, seed."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "Texts: max_length must be an integer >= 1, got 0."),
        ({"nearest": 0}, "Texts: nearest must be an integer >= 1, or None, got 0."),
        ({"nearest": "24"}, "Texts: nearest must be an integer >= 1, or None, got '24'."),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(EditError) as error:
        Texts(TEXTS, **options)
    assert str(error.value) == message


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("keep.txt", Texts("keep.txt")),
        ("world", Texts("world")),
        ("[One., Two.]", Texts(["One.", "Two."])),
        ("{source: keep.txt, nearest: 24}", Texts("keep.txt", nearest=24)),
        (
            "{class_path: kedit_train.callbacks.Texts, init_args: {source: [One.], max_length: 64}}",
            Texts(["One."], max_length=64),
        ),
    ],
)
def test_yaml_gives_a_source_or_texts(yaml, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=EditCallback)
    config = parser.parse_object(
        {"callback": {"class_path": "kedit_train.callbacks.KLLocality", "init_args": {"texts": safe_load(yaml)}}}
    )
    assert parser.instantiate(config).callback.texts == expected
