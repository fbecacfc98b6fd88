"""The trainer follows the launcher, or the run does not start."""

from __future__ import annotations

import pytest

from kedit_train.cli.processes import follow_launcher
from kedit_train.errors import EditError
from kedit_train.processes import check_process_count, end_process_group, launched_processes

DEFAULTS = {"accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None}
FABRIC = {"LT_CLI_USED": "1", "LT_NUM_NODES": "1"}
TWO = {**FABRIC, "LT_DEVICES": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
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
        # Processes that Lightning itself starts know only the world size.
        ({"devices": 2}, {"WORLD_SIZE": "2"}, {"devices": 2}),
    ],
)
def test_defaults_follow_the_launcher(settings: dict, environment: dict, expected: dict) -> None:
    trainer = {**DEFAULTS, **settings}
    follow_launcher(trainer, environment)
    assert trainer == {**DEFAULTS, **expected}


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"devices": 1}, TWO, r"uses 1 process.*started 2"),
        ({"devices": "0,"}, TWO, r"uses 1 process.*started 2"),
        ({"devices": 2}, {**FABRIC, "LT_DEVICES": "1"}, r"uses 2 process.*started 1.*let the launcher start 2"),
        ({"num_nodes": 2}, TWO, r"uses 4 process.*started 2"),
        ({"strategy": "ddp"}, {**TWO, "LT_STRATEGY": "fsdp"}, r"trainer.strategy is 'ddp'.*--strategy fsdp"),
        ({"precision": "16-mixed"}, {**TWO, "LT_PRECISION": "bf16-mixed"}, r"trainer.precision is '16-mixed'"),
    ],
)
def test_contradictions_are_refused(settings: dict, environment: dict, message: str) -> None:
    with pytest.raises(EditError, match=message):
        follow_launcher({**DEFAULTS, **settings}, environment)


def test_the_process_count_must_be_that_of_the_launcher() -> None:
    check_process_count(1, {})
    check_process_count(1, {"LT_CLI_USED": "1"})
    with pytest.raises(EditError, match="started 2"):
        check_process_count(1, TWO)


def test_launched_processes_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_processes({}) is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launched_processes() == 3


def test_ending_the_process_group_does_nothing_without_one() -> None:
    end_process_group()
