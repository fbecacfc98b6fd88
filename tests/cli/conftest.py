"""Fixtures: an edited copy of the bundled model, and the kedit command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kedit_train.cli.kedit import main


@pytest.fixture(scope="session")
def edited_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` (a checkpoint trained on three edits), ``edit.safetensors`` and ``edits.jsonl``."""
    from kedit_train import EditDataset, EditDelta, world
    from kedit_train.data.tokenization import collate, pad_token_id

    folder = tmp_path_factory.mktemp("edited")
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=3)
    batch = collate(edits.encode(tokenizer), pad_id=pad_token_id(tokenizer))
    optimizer = torch.optim.AdamW([model.get_parameter("model.layers.4.mlp.down_proj.weight")], lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    edits.save(folder / "edits.jsonl")
    delta = EditDelta.between(
        world.path(),
        folder / "model",
        edits=edits,
        configuration={"callbacks": ["ParameterScope(layers=0.7)", "TokenSmoothing(label_weight=0.1)"], "steps": 20},
        scores={"edit/reliability": 1.0},
    )
    delta.save(folder / "edit.safetensors")
    return folder


@pytest.fixture
def kedit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``kedit("ls", ...)`` returns (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
