"""ResponseDataModule: when a run uses the files of an earlier run, and temporary folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from control.response_runs import IGNORED, data_module, trainer

from kedit_train.control import (
    SamplingOptions,
    ValueModule,
)
from kedit_train.control.response_data import _temporary_folder
from kedit_train.control.responses import sample_responses
from kedit_train.control.state_shards import StateShards
from kedit_train.errors import EditError

pytestmark = IGNORED


def test_another_chat_template_has_other_states(tmp_path: Path) -> None:
    counts = []
    for answer in ("A:", "A:", "Answer:"):
        module = ValueModule(width=8)
        module.tokenizer.chat_template = (
            "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'user' %}"
            f"{answer}{{% endif %}}{{% endfor %}}"
        )
        trainer().fit(module, data_module(prompt_format="chat", cache_dir=str(tmp_path)))
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 1, 2]


def test_another_end_token_has_other_states(tmp_path: Path) -> None:
    for ends in (1, 2):
        module = ValueModule(width=8)
        module.language_model.generation_config.eos_token_id = list(range(3, 3 + ends))
        trainer().fit(module, data_module(cache_dir=str(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 2


def test_two_runs_with_one_folder_do_not_mix_their_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedit_train.control.response_data._CHUNK", 4)
    alone = data_module(cache_dir=str(tmp_path / "alone"))
    trainer().fit(ValueModule(width=8), alone)
    calls: list[int] = []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        """Before the second chunk, another run writes all of its files."""
        calls.append(1)
        if len(calls) == 2:
            other = SamplingOptions(samples=2, max_new_tokens=4, seed=9)
            trainer().fit(ValueModule(width=8), data_module(sampling=other, cache_dir=str(tmp_path / "both")))
        return sample_responses(*args, **kwargs)

    monkeypatch.setattr("kedit_train.control.response_data.sample_responses", interrupt)
    both = data_module(cache_dir=str(tmp_path / "both"))
    trainer().fit(ValueModule(width=8), both)
    assert alone.shards is not None
    assert both.shards is not None
    assert both.shards.texts == alone.shards.texts


def test_a_file_with_another_key_is_refused(tmp_path: Path) -> None:
    data = data_module(cache_dir=str(tmp_path))
    trainer().fit(ValueModule(width=8), data)
    (path,) = tmp_path.iterdir()
    with pytest.raises(EditError, match="was replaced by another run"):
        StateShards({path: "another key"})


def test_the_folders_of_killed_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = "import os, signal; from pathlib import Path; from kedit_train.control import response_data\n"
    killed += "response_data._temporary_folder(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", killed], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)

    def folders() -> list[Path]:
        # The killed process may also leave a folder of torch.
        return sorted(tmp_path.glob("kedit-value*"))

    (left,) = folders()
    folder = _temporary_folder()
    assert left != folder
    assert folders() == [folder]
    # The folder of a running process stays.
    other = _temporary_folder()
    assert folders() == sorted([folder, other])


def test_a_run_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer().fit(ValueModule(width=8), data_module())
    assert not list(tmp_path.iterdir())
