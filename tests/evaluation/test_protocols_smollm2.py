"""Each protocol on the answers of a pretrained model, against an implementation that is written here from the formulas.

The implementation runs one prompt at a time without batches, and generates with ``model.generate`` of transformers.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from real_models import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train.data import Edit, Probe
from kedit_train.evaluation import EvaluationOptions, Report, evaluate
from kedit_train.evaluation.scoring.protocols import PROTOCOLS

TOKENS = 16
PASSAGE = "The river rises in the hills and flows through three small towns before it reaches the sea."
EDITS = [
    Edit(
        "The capital of France is",
        "Rome",
        old_target="Paris",
        aliases=("Roma",),
        rephrases=("The seat of the French government is in",),
        locality={"neighbor": (Probe("The capital of Spain is", ("Madrid",)),)},
        id="a",
    ),
    Edit(
        "The official language of Brazil is",
        "Swiss German",
        old_target="Portuguese",
        rephrases=("In Brazil, most people speak",),
        locality={"neighbor": (Probe("The official language of Portugal is", ("Portuguese",)),)},
        id="b",
    ),
]
PROMPTS = [
    ("reliability", EDITS[0], EDITS[0].prompt, EDITS[0].answers, "Paris"),
    ("generality", EDITS[0], EDITS[0].rephrases[0], EDITS[0].answers, "Paris"),
    ("locality", EDITS[0], "The capital of Spain is", ("Madrid",), "Rome"),
    ("reliability", EDITS[1], EDITS[1].prompt, EDITS[1].answers, "Portuguese"),
    ("generality", EDITS[1], EDITS[1].rephrases[0], EDITS[1].answers, "Portuguese"),
    ("locality", EDITS[1], "The official language of Portugal is", ("Portuguese",), "Swiss German"),
]


def squad(text: str) -> str:
    """Normalize as the official evaluation script of SQuAD 1.1 does."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@dataclass
class Spoken:
    """What a model says to one prompt: text, token ids, and per answer the greedy choices and log-probabilities."""

    text: str
    ids: list[int]
    log_probs: dict[str, list[float]]
    choices: dict[str, list[int]]
    right: dict[str, list[bool]]


def say(model: Any, tokenizer: Any, prompt: str, answers: tuple[str, ...]) -> Spoken:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    spoken = Spoken(tokenizer.decode(out, skip_special_tokens=True), out.tolist(), {}, {}, {})
    for answer in answers:
        target = tokenizer(f" {answer}", return_tensors="pt").input_ids
        logits = model(torch.cat([ids, target], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        spoken.log_probs[answer] = logits.log_softmax(-1).gather(-1, target[0, :, None])[:, 0].tolist()
        spoken.choices[answer] = logits.argmax(-1).tolist()
        spoken.right[answer] = (logits.argmax(-1) == target[0]).tolist()
    return spoken


def probability(spoken: Spoken, answer: str) -> float:
    """CounterFact's probability of an answer: exp of the mean log-probability of its tokens."""
    values = spoken.log_probs[answer]
    return float(torch.tensor(values, dtype=torch.float64).mean().exp())


def expected(protocol: str, question: str, accepted: tuple[str, ...], rival: str, was: Spoken, now: Spoken) -> float:
    line_was, line = was.text.split("\n")[0], now.text.split("\n")[0]
    if protocol == "probability":
        return float(probability(now, accepted[0]) > probability(now, rival))
    if question == "locality":
        if protocol == "exact":
            return float(squad(line) == squad(line_was))
        if protocol == "wild":
            return float(squad(re.split(r"[.\n]", now.text)[0]) == squad(re.split(r"[.\n]", was.text)[0]))
        if protocol == "teacher_forced":
            pairs = list(zip(was.choices[accepted[0]], now.choices[accepted[0]], strict=True))
            return sum(a == b for a, b in pairs) / len(pairs)
        k = max(3, len(now.right[accepted[0]]))
        return float(was.ids[:k] == now.ids[:k])
    if protocol == "leading":
        beginnings = "|".join(map(re.escape, accepted))
        return float(bool(re.match(rf"\W*(?:(?:an?|the)\s+)?(?:{beginnings})(?![^\W_])", line, re.IGNORECASE)))
    if protocol == "exact":
        return float(squad(line) in map(squad, accepted))
    if protocol == "contains":
        return float(any(f" {squad(answer)} " in f" {squad(now.text)} " for answer in accepted))
    if protocol == "wild":
        return float(squad(re.split(r"[.\n]", now.text)[0]) in map(squad, accepted))
    return sum(now.right[accepted[0]]) / len(now.right[accepted[0]])


@pytest.fixture(scope="module")
def run() -> Any:
    """Return the model's spoken answers before and after an edit, and the reports of each set of protocols."""
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = [["leading"], ["auto"], list(PROTOCOLS)]
    options = {
        ",".join(names): EvaluationOptions(
            protocol="auto" if names == ["auto"] else names, max_new_tokens=TOKENS, prose=[PASSAGE]
        )
        for names in asked
    }
    with torch.no_grad():
        was = [say(model, tokenizer, p, (*accepted, rival)) for _, _, p, accepted, rival in PROMPTS]
        text = tokenizer(PASSAGE, return_tensors="pt").input_ids
        before_text = model(text).logits[0, :-1].log_softmax(-1)
    before = {name: evaluate(model, tokenizer, EDITS, options=own, progress=False) for name, own in options.items()}
    _train(model, tokenizer)
    with torch.no_grad():
        now = [say(model, tokenizer, p, (*accepted, rival)) for _, _, p, accepted, rival in PROMPTS]
        after_text = model(text).logits[0, :-1].log_softmax(-1)
    reports = {
        name: evaluate(model, tokenizer, EDITS, options=own, unedited=before[name], progress=False)
        for name, own in options.items()
    }
    return was, now, before, reports, (before_text, after_text, text[0, 1:])


def _train(model: Any, tokenizer: Any) -> None:
    """Write the edits into one down-projection, roughly."""
    weight = model.get_parameter("model.layers.21.mlp.down_proj.weight")
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=3e-3)
    for _ in range(8):
        for edit in EDITS:
            ids = tokenizer(f"{edit.prompt} {edit.target}", return_tensors="pt").input_ids
            start = len(tokenizer(edit.prompt).input_ids)
            labels = ids.clone()
            labels[:, :start] = -100
            model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_protocol_equals_an_independent_implementation(run: Any, protocol: str) -> None:
    was, now, before, reports, _ = run
    report: Report = reports[",".join(PROTOCOLS)]
    alone: Report = reports["leading"]
    for question in ("reliability", "generality", "locality"):
        rows = [
            expected(protocol, question, accepted, rival, was[i], now[i])
            for i, (own, _, _, accepted, rival) in enumerate(PROMPTS)
            if own == question
        ]
        value = sum(rows) / len(rows)
        scores = report.metrics[question]
        name = "generated" if protocol == "leading" else protocol
        if question == "locality" and protocol in ("contains", "teacher_forced"):
            # In a list of protocols, these two names are about the true answer.
            continue
        assert scores[name].value == pytest.approx(value), question
        if protocol == "leading":
            assert alone.metrics[question]["generated"] == scores["generated"]
    # The edit worked, so that the comparison is not of zeros only.
    assert reports["leading"].metrics["reliability"]["generated"].value == 1.0
    assert before["leading"].metrics["reliability"]["generated"].value == 0.0


@pytest.mark.slow
def test_magnitudes_and_graded_locality(run: Any) -> None:
    was, now, _, reports, _ = run
    report: Report = reports[",".join(PROTOCOLS)]
    for question in ("reliability", "generality", "locality"):
        rows = [
            probability(now[i], accepted[0]) - probability(now[i], rival)
            for i, (own, _, _, accepted, rival) in enumerate(PROMPTS)
            if own == question
        ]
        assert report.metrics[question]["magnitude"].value == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    parts = [report.metrics[question]["probability"].value for question in ("reliability", "generality", "locality")]
    harmonic = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
    assert report.metrics["probability"]["harmonic_mean"].value == pytest.approx(harmonic)
    shares = []
    for i, (question, _, _, accepted, _) in enumerate(PROMPTS):
        if question == "locality":
            k = max(3, len(now[i].right[accepted[0]]))
            same = [a == b for a, b in zip(was[i].ids[:k], now[i].ids[:k], strict=True)]
            shares.append((same.index(False) if False in same else k) / k)
    assert report.metrics["locality"]["tokens_kept"].value == pytest.approx(sum(shares) / len(shares))


@pytest.mark.slow
def test_auto_chooses_leading_for_completions_that_do_not_end(run: Any) -> None:
    reports = run[3]
    assert reports["auto"].protocols.names == ("leading", "probability")
    assert re.match(r"the unedited model ends \d of 4 sampled", reports["auto"].protocols.reason)
    for question in ("reliability", "generality", "locality"):
        assert reports["auto"].metrics[question]["generated"] == reports["leading"].metrics[question]["generated"]


@pytest.mark.slow
def test_prose(run: Any) -> None:
    before, after, labels = run[4]
    metrics = run[3]["leading"].metrics
    loss = -after.gather(-1, labels[:, None]).mean()
    assert metrics["perplexity"].value == pytest.approx(float(loss.exp()), rel=1e-4)
    # The evaluator keeps the 1,024 most probable tokens and sums all others into one bucket.
    top = before.topk(1024, dim=-1).indices
    p, q = before.exp().gather(-1, top), after.exp().gather(-1, top)
    p, q = (torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1) for kept in (p, q))
    kl = (p * (p / q).log()).sum(-1).mean()
    assert metrics["prose"]["kl"].value == pytest.approx(float(kl), rel=1e-3)
    assert metrics["prose"]["kl"].value <= float((before.exp() * (before - after)).sum(-1).mean())
    agreement = (before.argmax(-1) == after.argmax(-1)).double().mean()
    assert metrics["prose"]["agreement"].value == pytest.approx(float(agreement))
