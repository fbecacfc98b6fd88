"""The probes of an edit."""

from __future__ import annotations

from kedit_train.data import Edit, Probe
from kedit_train.evaluation.asking.probes import PREFIXES, choice_prompt, negation_prompt, probe_requests
from kedit_train.evaluation.options import EXTRA_METRICS

EDIT = Edit(
    "Ann lives in",
    "Oslo",
    old_target="Rome",
    rephrases=("Ann's town:",),
    locality={"near": (Probe("Bob lives in", ("Lima",)),)},
    portability={"country": (Probe("Ann's country:", ("Norway",)),)},
)


def kinds(metrics: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(request.question, request.kind) for request in probe_requests(EDIT, "ann", metrics=metrics)]


def test_the_core_probes_come_from_the_data():
    assert kinds() == [
        ("reliability", "prompt"),
        ("generality", "rephrase"),
        ("portability", "country"),
        ("locality", "near"),
    ]


def test_each_extra_metric_adds_its_probes():
    added = {metric: [kind for kind in kinds((metric,)) if kind not in kinds()] for metric in EXTRA_METRICS}
    assert added == {
        "prefixes": [("generality", "prefix")] * 2,
        "format": [("generality", "format")],
        "kl": [],
        "resurgence": [("resurgence", "negation"), ("resurgence", "choice"), ("resurgence", "choice")],
        "fluency": [("fluency", "continuation")],
        "retrieval": [],
        "overlap": [("overlap", "prompt"), ("overlap", "rephrase")],
    }


def test_the_prefixes_depend_on_the_seed_and_the_name_of_the_edit():
    def drawn(name: str, seed: int) -> list[str]:
        requests = probe_requests(EDIT, name, metrics=("prefixes",), seed=seed)
        return [request.prompt for request in requests if request.kind == "prefix"]

    assert drawn("ann", 0) == drawn("ann", 0)
    assert len({tuple(drawn(name, seed)) for name in ("ann", "bob") for seed in range(4)}) > 1
    assert all(prompt.removesuffix(" Ann lives in") in PREFIXES for prompt in drawn("ann", 0))


def test_the_old_answer_is_denied_and_offered_as_a_choice():
    assert negation_prompt("Ann lives in", "Rome") == 'It is false that "Ann lives in Rome". Ann lives in'
    assert choice_prompt("Ann lives in", ("Oslo", "Rome")) == (
        "Which one is right?\nA. Ann lives in Oslo\nB. Ann lives in Rome\nAnswer:"
    )
