"""The trainer follows the launcher or the run does not start (HOSTS trap 13)."""

from __future__ import annotations

import pytest

from kedit_train.cli.processes import check_world, follow_launcher, world_size
from kedit_train.errors import EditError

SILENT = {"accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None}
FABRIC = {"LT_CLI_USED": "1", "LT_NUM_NODES": "1"}
TWO = {**FABRIC, "LT_DEVICES": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("said", "environment", "expected"),
    [
        ({}, {}, {}),
        ({"devices": 3}, {}, {"devices": 3}),
        ({}, TWO, {"devices": 2}),
        ({"devices": 2}, TWO, {"devices": 2}),
        ({"devices": "2"}, TWO, {"devices": "2"}),
        ({}, {**TWO, "LT_DEVICES": "0,3"}, {"devices": "0,3"}),
        ({"devices": [1, 4]}, TWO, {"devices": [1, 4]}),
        ({}, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, {"devices": 2, "num_nodes": 2}),
        ({}, {**FABRIC, "LT_DEVICES": "1"}, {"devices": 1}),
        (
            {},
            {**TWO, "LT_STRATEGY": "fsdp", "LT_ACCELERATOR": "cpu"},
            {"devices": 2, "strategy": "fsdp", "accelerator": "cpu"},
        ),
        ({"precision": "bf16-mixed"}, {**TWO, "LT_PRECISION": "bf16-mixed"}, {"devices": 2, "precision": "bf16-mixed"}),
        # Processes that Lightning itself starts know the size only, and the configuration as it was given.
        ({"devices": 2}, {"WORLD_SIZE": "2"}, {"devices": 2}),
    ],
)
def test_what_is_silent_follows(said: dict, environment: dict, expected: dict) -> None:
    trainer = {**SILENT, **said}
    follow_launcher(trainer, environment)
    assert trainer == {**SILENT, **expected}


@pytest.mark.parametrize(
    ("said", "environment", "message"),
    [
        ({"devices": 1}, TWO, r"set to 1 process.*started 2"),
        ({"devices": "0,"}, TWO, r"set to 1 process.*started 2"),
        ({"devices": 2}, {**FABRIC, "LT_DEVICES": "1"}, r"set to 2 process.*started 1.*--devices 2"),
        ({"num_nodes": 2}, TWO, r"set to 4 process.*started 2"),
        ({"strategy": "ddp"}, {**TWO, "LT_STRATEGY": "fsdp"}, r"trainer.strategy is 'ddp'.*--strategy fsdp"),
        ({"precision": "16-mixed"}, {**TWO, "LT_PRECISION": "bf16-mixed"}, r"trainer.precision is '16-mixed'"),
    ],
)
def test_what_contradicts_is_refused(said: dict, environment: dict, message: str) -> None:
    with pytest.raises(EditError, match=message):
        follow_launcher({**SILENT, **said}, environment)


def test_the_trainers_own_count_has_the_last_word() -> None:
    check_world(1, {})
    check_world(1, {"LT_CLI_USED": "1"})
    with pytest.raises(EditError, match="started 2"):
        check_world(1, TWO)
    assert world_size({}) is None
