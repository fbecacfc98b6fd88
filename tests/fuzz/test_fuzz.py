"""Mutated files are refused in one line, or read as values that can be used: deltas, edits, recipes and others.

The fuzzers take a few seconds together. For longer runs by hand, set ``KEDIT_FUZZ_SECONDS=600``, or run
``campaign.py``, which goes on after a failure. A failure prints the seed of the mutated file; ``KEDIT_FUZZ_SEED``
starts with that seed. ``corpus/`` contains files that once failed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.edits import EDITS, TEXTS
from fuzz.harness import SECONDS, Fuzzer, fuzz, run
from fuzz.recipes import RECIPES
from fuzz.tensor_files import TENSORS

# Lightning 2.6 still calls what jsonargparse 4.53 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
FUZZERS: dict[str, Fuzzer] = {**RECIPES, **TENSORS, **TEXTS, **EDITS}
CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", FUZZERS)
def test_mutated_files_are_refused_in_one_line_or_can_be_used(tmp_path: Path, name: str) -> None:
    fuzzer = FUZZERS[name]
    outcomes = fuzz(fuzzer, tmp_path, seconds=SECONDS / len(FUZZERS))
    assert outcomes.total() < 100 or outcomes["refused"] > fuzzer.refused * outcomes.total(), outcomes


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_that_once_failed(tmp_path: Path, path: Path) -> None:
    """Each folder of the corpus has the name of a fuzzer."""
    run(FUZZERS[path.parent.name], path.read_bytes(), tmp_path)
