"""Folders and files of documents, and documents that are longer than the context of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_train import world
from kedit_train.data import Edit, EditDataset, Probe, split_documents
from kedit_train.errors import EditError


def folder(tmp_path: Path, files: dict[str, str]) -> Path:
    news = tmp_path / "news"
    for name, text in files.items():
        path = news / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return news


def asked(prompt: str, answer: str) -> dict[str, tuple[Probe, ...]]:
    return {"questions": (Probe(prompt, (answer,)),)}


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    questions = [{"prompt": "Who runs the ferry?", "answers": ["Orla"]}]
    news = folder(
        tmp_path,
        {
            "a.txt": "The Tarn ferry\n\nThe ferry sails at noon.\n\nIt is green.\n",
            "b-lock_2.txt": "The lock is closed.\nIt opens in May.",
            "c.md": "# The bell #\nIt rings twice.\n",
            "d.jsonl": json.dumps({"title": "Ferry", "text": "Orla runs it.", "questions": questions, "id": "x"})
            + "\n"
            + json.dumps({"text": "No title here.", "subject": "title"}),
            "sub/e.csv": 'title,text,questions\nBridge,"It is new.","[{""prompt"": ""Is it new?"", ""answers"": [""Yes""]}]"\n',  # noqa: E501
            ".hidden.txt": "not read",
        },
    )
    edits = EditDataset.load(news)
    assert (edits.name, edits.format, edits.skipped) == ("news", "documents", ())
    assert list(edits) == [
        Edit("The Tarn ferry\n\n", "The ferry sails at noon.\n\nIt is green.", id="a.txt"),
        Edit("b lock 2\n\n", "The lock is closed.\nIt opens in May.", id="b-lock_2.txt"),
        Edit("The bell\n\n", "It rings twice.", id="c.md"),
        Edit("Ferry\n\n", "Orla runs it.", portability=asked("Who runs the ferry?", "Orla"), id="x"),
        Edit("d 2\n\n", "No title here.", subject="title", id="d.jsonl, record 2"),
        Edit("Bridge\n\n", "It is new.", portability=asked("Is it new?", "Yes"), id="sub/e.csv, record 1"),
    ]  # fmt: skip
    # A file alone is read in the same way.
    assert EditDataset.load(news / "c.md")[0] == edits[2]
    assert EditDataset.load(news / "d.jsonl")[0] == edits[3]


def test_every_token_after_the_title_is_trained() -> None:
    _, tokenizer = world.load()
    edits = EditDataset.from_records([{"title": "News", "text": "Ada lives in Bern."}])
    [encoded] = edits.encode(tokenizer, append_eos=False)
    assert edits.format == "documents"
    assert tokenizer.decode(encoded.input_ids[encoded.target_start :]) == "Ada lives in Bern."


def test_equal_titles_get_numbers(tmp_path: Path) -> None:
    news = folder(tmp_path, {"a.md": "# Notes\nOne.", "b.md": "# notes\nTwo.", "c.md": "# Notes\nThree."})
    edits = EditDataset.load(news)
    assert [edit.prompt for edit in edits] == ["Notes\n\n", "notes (2)\n\n", "Notes (3)\n\n"]
    edits.check_trained_together()


def test_a_numbered_title_is_not_the_title_of_another_document(tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    titles = ["A", "a", "A (2)", "A"]
    path.write_text("\n".join(json.dumps({"title": title, "text": f"Text {i}."}) for i, title in enumerate(titles)))
    edits = EditDataset.load(path)
    assert [edit.prompt for edit in edits] == ["A\n\n", "a (3)\n\n", "A (2)\n\n", "A (4)\n\n"]
    edits.check_trained_together()


def test_empty_documents_and_unread_files_are_reported_in_one_line(tmp_path: Path) -> None:
    news = folder(tmp_path, {"a.txt": "Full.", "b.txt": " \n\u200b", "c.pdf": "%PDF"})
    with (
        pytest.warns(UserWarning, match=r"news: 1 of 3 files do not end in \.txt, \.md"),
        pytest.raises(EditError) as caught,
    ):
        EditDataset.load(news)
    assert str(caught.value) == (
        f"{news / 'b.txt'}: the document must contain text, got an empty file; correct the record, or pass "
        'on_error="skip" to leave out records with errors'
    )
    (news / "c.pdf").unlink()
    with pytest.warns(UserWarning, match=f"^{news}: skipped 1 of 2 records; the first reason: .*b.txt"):
        edits = EditDataset.load(news, on_error="skip")
    assert len(edits) == 1
    (news / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(EditError, match=r"none of the 2 records can be read; .*UTF-8"):
        EditDataset.load(news, on_error="skip")


def test_a_path_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"missing: the path does not exist \(working directory"):
        EditDataset.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditError, match=r"must contain documents \(.txt, .md, .jsonl, .csv\), got no files"):
        EditDataset.load(tmp_path / "empty")
    with pytest.raises(EditError, match=r"no\.txt: the file does not exist"):
        EditDataset.load(tmp_path / "no.txt")
    news = folder(tmp_path, {"a.jsonl": '{"prompt": "p", "target": "t"}'})
    with pytest.raises(EditError, match=r"news/a\.jsonl, record 1: field 'text' must be text, but is missing"):
        EditDataset.load(news)


def test_further_columns_are_ignored_and_errors_name_the_file(tmp_path: Path) -> None:
    news = folder(
        tmp_path,
        {
            "a.csv": "title,text,url,headline\nFerry,It is green.,http://a,Big\nLock,It is closed.,http://b,\n",
            "b.jsonl": json.dumps({"title": "Bell", "text": "It rings.", "url": "http://c"}),
        },
    )
    with pytest.warns(UserWarning, match="does not read") as caught:
        edits = EditDataset.load(news)
    [warning] = caught
    assert str(warning.message) == (
        f"{news}: the format documents does not read the fields 'headline' (1 records), 'url' (3 records)"
    )
    assert [edit.target for edit in edits] == ["It is green.", "It is closed.", "It rings."]
    with pytest.warns(UserWarning, match="does not read the fields 'url'"):
        EditDataset.load(news / "b.jsonl")
    # The record number counts the records of the file, not those of the folder.
    (news / "b.jsonl").write_text('{"text": "It rings."}\n{"text": 3}\n7\n')
    (news / "a.csv").write_text("title,text\nFerry,It is green.\nLock,It is closed.\n")
    with pytest.warns(UserWarning, match=r"first reason: .*news/b\.jsonl, record 2: field 'text' must be text"):
        skipped = EditDataset.load(news, on_error="skip").skipped
    assert "news/b.jsonl, record 3: the record must be a mapping" in skipped[1]


def test_only_documents_get_a_title(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    lines = ['{"prompt": "Ada lives in", "target": "Bern"}', '{"prompt": "Ben lives in", "target": "Rome", "id": "x"}']
    path.write_text("\n".join([*lines, '{"text": "The bell rings."}']))
    with pytest.raises(EditError, match=r"mixed\.jsonl, record 3: field 'text' belongs to the format documents"):
        EditDataset.load(path)
    with pytest.warns(UserWarning, match="skipped 1 of 3 records"):
        assert EditDataset.load(path, on_error="skip")[0] == Edit("Ada lives in", "Bern")


def test_a_heading_without_text_is_an_empty_document(tmp_path: Path) -> None:
    news = folder(tmp_path, {"a.md": "# The bell\n\n\u200b\n"})
    with pytest.raises(EditError, match=r"a\.md: the document must contain text, got only a heading"):
        EditDataset.load(news / "a.md")


def test_a_line_of_spaces_after_the_title_is_an_empty_line(tmp_path: Path) -> None:
    news = folder(tmp_path, {"a.txt": "The bell\n \t\nIt rings.", "b.txt": "One line."})
    assert EditDataset.load(news / "a.txt")[0] == Edit("The bell\n\n", "It rings.", id="a.txt")
    assert EditDataset.load(news / "b.txt")[0] == Edit("b\n\n", "One line.", id="b.txt")


PARAGRAPHS = "\n\n".join(f"Paragraph {i} says that the bell rings. It rings {i} times a day." for i in range(12))


def test_a_long_document_is_split_within_the_limit_and_counted() -> None:
    _, tokenizer = world.load()
    probe = {"questions": (Probe("How often?", ("twice",)),)}
    long = Edit("Bell\n\n", PARAGRAPHS, subject="Bell", portability=probe, id="bell.txt")
    edits = EditDataset([Edit("Short\n\n", "It is short."), long], name="news")
    counts = r"1 of 2 edits of news have more than 120 tokens and were split; there are now \d+ edits"
    with pytest.warns(UserWarning, match=counts):
        parts = split_documents(edits, tokenizer, 120)
    assert len(parts) > 4
    assert parts[0] == edits[0]
    assert (parts[1].prompt, parts[1].portability, parts[1].id) == (long.prompt, probe, "bell.txt")
    assert (parts[2].prompt, parts[2].portability, parts[2].id) == ("Bell (part 2)\n\n", {}, "bell.txt, part 2")
    assert all(len(example.input_ids) <= 120 for example in parts.encode(tokenizer))
    # No word is lost, and every part ends with a sentence.
    assert " ".join(part.target for part in parts[1:]).split() == PARAGRAPHS.split()
    assert all(part.target.endswith(".") for part in parts)


@pytest.mark.parametrize("text", ["word " * 200, "x" * 600, "鐘は一日に二回鳴る。" * 40])
def test_a_text_without_sentences_is_split_too(text: str) -> None:
    _, tokenizer = world.load()
    with pytest.warns(UserWarning, match="were split"):
        parts = split_documents(EditDataset([Edit("Bell\n\n", text.strip())]), tokenizer, 100)
    assert "".join("".join(part.target for part in parts).split()) == "".join(text.split())
    assert all(len(example.input_ids) <= 100 for example in parts.encode(tokenizer))


def test_every_part_is_within_the_limit_if_joined_sentences_have_more_tokens() -> None:
    _, tokenizer = world.load()
    # Each of these words is one token at the beginning of a text, and four tokens after a space.
    text = " ".join(["ekrosar. adrelix. ababurg."] * 20)
    for limit in range(40, 60):
        with pytest.warns(UserWarning, match="were split"):
            parts = split_documents(EditDataset([Edit("Bell\n\n", text)]), tokenizer, limit)
        assert max(len(example.input_ids) for example in parts.encode(tokenizer)) <= limit
        assert " ".join(part.target for part in parts).split() == text.split()


def test_the_prompt_of_a_part_is_not_that_of_another_document() -> None:
    _, tokenizer = world.load()
    edits = EditDataset([Edit("Bell\n\n", PARAGRAPHS), Edit("bell (Part 2)\n\n", "It is old.")])
    with pytest.warns(UserWarning, match="were split"):
        parts = split_documents(edits, tokenizer, 300)
    assert [part.prompt for part in parts] == ["Bell\n\n", "Bell (part 3)\n\n", "bell (Part 2)\n\n"]
    parts.check_trained_together()


def test_a_limit_below_the_prompt_is_an_error() -> None:
    _, tokenizer = world.load()
    edits = EditDataset([Edit("Bell\n\n", PARAGRAPHS)])
    with pytest.raises(EditError, match=r"^split_documents: max_length must leave room for the prompt 'Bell'"):
        split_documents(edits, tokenizer, 5)
    assert split_documents(edits, tokenizer, None) is edits
    assert split_documents(edits, tokenizer, 10_000) is edits
