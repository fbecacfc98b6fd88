"""Records per second of the evaluator, compared with one prompt at a time through ``model.generate``.

python tests/benchmarks/evaluation.py --clock cpu

A record is an edit with all its questions: prompt, rephrases and locality probes. With ``full``, it also has
questions after neutral sentences, in another format, with the old answer denied and as a choice, and a continuation
of 100 tokens. The loop around ``model.generate`` uses the same greedy search, key/value cache, line break and limits.
It only generates; the evaluator also scores teacher forcing and, with ``full``, old answers and divergences. The
answers of both are compared for the unedited model and for a model that was trained on all edits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from paired import arguments, clock, record, table
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from kedit_train import EditDataset, Report
from kedit_train.callbacks import ParameterScope
from kedit_train.data.tokenization import encode_prompt, pad_token_id
from kedit_train.evaluation import EvaluationOptions, evaluate
from kedit_train.evaluation.asking.probes import ProbeRequest, probe_requests
from kedit_train.evaluation.options import EXTRA_METRICS
from kedit_train.modes import TrainLoop

FACTLM = Path(__file__).resolve().parents[3] / "shared" / "models" / "factlm"
LONGEST, CONTINUATION = 32, 100
HEAD = ("", "questions a record", "records/s", "times as fast", "same answers")


class _LineBreak(StoppingCriteria):
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(["\n" in self.tokenizer.decode(row[-1:]) for row in input_ids])


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, asked: Sequence[ProbeRequest]) -> list[str]:
    said, stops = [], StoppingCriteriaList([_LineBreak(tokenizer)])
    for one in asked:
        goes_on = one.question == "fluency"
        ids = torch.tensor([encode_prompt(tokenizer, one.prompt)], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=CONTINUATION if goes_on else LONGEST,
            pad_token_id=pad_token_id(tokenizer),
            stopping_criteria=None if goes_on else stops,
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        said.append((text if goes_on else text.split("\n")[0]).strip())
    return said


def of_state(
    state: str,
    model: Any,
    tokenizer: Any,
    edits: EditDataset,
    before: dict[bool, Report],
    options: argparse.Namespace,
    now: Callable[[], float],
) -> tuple[list[list[str]], dict[bool, Report]]:
    """Return the table rows and the reports of one model: core (False) and full (True)."""
    rows, reports = [], {}
    for full, how in ((False, "core"), (True, "full")):
        # One at a time, the continuations of ten records take most of a minute.
        some = edits[: max(1, options.single // (5 if full else 1))]
        extras = EXTRA_METRICS if full else ()
        asked = [one for i, edit in enumerate(some) for one in probe_requests(edit, edit.id or str(i), metrics=extras)]
        began = now()
        single = one_at_a_time(model, tokenizer, asked)
        slow = (now() - began) / len(some)
        began = now()
        measured = EvaluationOptions(metrics=extras)
        report = evaluate(model, tokenizer, edits, unedited=before.get(full), options=measured, progress=False)
        fast = (now() - began) / len(edits)
        own = {(row.question == "fluency", row.prompt): row.answer for row in report.answers}
        same = sum(own[one.question == "fluency", one.prompt] == s for one, s in zip(asked, single, strict=True))
        each = f"{len(asked) / len(some):.1f}"
        rows.append([f"(a) {state}, {how}: one at a time, {len(some)} records", each, f"{1 / slow:.2f}", "1.0", ""])
        agree = f"{same} of {len(asked)}"
        rows.append([f"(b) {state}, {how}: `evaluate`", each, f"{1 / fast:.2f}", f"{slow / fast:.1f}", agree])
        print(*rows[-2:], report.meta["near_ties"], sep="\n", flush=True)
        reports[full] = report
    return rows, reports


def main() -> None:
    parser = arguments(__doc__, records=1000, single=50, epochs=6)
    options = parser.parse_args()
    if options.quick:
        options.records, options.single, options.epochs = 4, 2, 2
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    now = clock(options)
    model: Any = AutoModelForCausalLM.from_pretrained(FACTLM, dtype=getattr(torch, options.dtype))
    model, tokenizer = model.to(options.device).eval(), AutoTokenizer.from_pretrained(FACTLM)
    edits = EditDataset.load(FACTLM / "records.json", limit=options.records)
    rows, before = of_state("unedited", model, tokenizer, edits, {}, options, now)
    train = TrainLoop(
        tokenizer,
        callbacks=[ParameterScope(0.9, modules="mlp.down_proj")],
        epochs=options.epochs,
        batch_size=64,
        learning_rate=3e-3,
        stop_loss=0.0,
    )
    train(model, edits)
    more, after = of_state("edited", model, tokenizer, edits, before, options, now)
    ties = [report.meta["near_ties"] for report in (*before.values(), *after.values())]
    right = after[False].flat()["edit/reliability"]
    body = f"""{len(edits)} records; edited: {options.epochs} epochs of training, reliability {right:.3f} after it.

{table(HEAD, [*rows, *more])}

Answers with two almost equal tokens, which depend on the batch: {sum(ties)}."""
    size = "tiny" if options.quick else f"{len(edits)} records"
    record(f"Evaluation, factlm, {size}", body, options)


if __name__ == "__main__":
    main()
