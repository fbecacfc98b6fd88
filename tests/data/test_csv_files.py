"""Edits from CSV files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.errors import EditError


def test_csv_files_may_have_quotes_lists_and_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "\ufeffprompt,target,aliases,rephrases,locality,id\n"
        '"Ada, the poet, lives in",Bern,Berne|Berna,"[""Ada\'s home, a | b"", ""two""]",'
        '"{""near"": [{""prompt"": ""Ben lives in"", ""answers"": [""Basel""]}]}",1\n'
        "Ben lives in,Basel,,,Cid lives in|Dora lives in,\n"
        "\n"
    )
    edits = EditDataset.load(path)
    assert list(edits) == [
        Edit(
            "Ada, the poet, lives in",
            "Bern",
            aliases=("Berne", "Berna"),
            rephrases=("Ada's home, a | b", "two"),
            locality={"near": (Probe("Ben lives in", ("Basel",)),)},
            id="1",
        ),
        Edit("Ben lives in", "Basel", locality={"other": (Probe("Cid lives in"), Probe("Dora lives in"))}),
    ]


def test_names_of_csv_columns_may_have_spaces_around_them(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(" prompt, target , aliases\nAda lives in,Bern,Berne\n")
    assert list(EditDataset.load(path)) == [Edit("Ada lives in", "Bern", aliases=("Berne",))]
    path.write_text("prompt, target, notes\nAda lives in,Bern,x\n")
    with pytest.raises(EditError, match="unknown field 'notes'"):
        EditDataset.load(path)


def test_csv_files_may_have_a_public_format(tmp_path: Path) -> None:
    path = tmp_path / "zsre.csv"
    path.write_text("subject,src,alt,answers,loc,loc_ans\nAda,Who is Ada?,a poet,a nun|a cook,nq question: who,me\n")
    edits = EditDataset.load(path)
    assert edits.format == "zsre"
    assert edits[0].old_target == "a nun"


def test_a_long_cell_is_read_and_the_limit_of_the_csv_module_stays(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text(f"title,text\nFerry,{'It is green. ' * 15_000}\nLock,It is closed.\n")
    limit = csv.field_size_limit()
    edits = EditDataset.load(path)
    assert len(edits) == 2
    assert len(edits[0].target) > limit == csv.field_size_limit()
