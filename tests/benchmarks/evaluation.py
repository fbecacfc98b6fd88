"""How many records a second of CPU time (one thread) the evaluator scores, against one prompt at a time through the
host's own ``generate``.

python tests/benchmarks/evaluation.py --records 1000

A record is an edit's prompt, its rephrasings and its locality probe. One at a time is what a loop around
``model.generate`` does, with the same greedy search, key/value cache, line break and bound; it scores generated answers
only, while the evaluator scores teacher forcing as well. The answers of both are compared: they must be the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from kedit_train import EditDataset
from kedit_train.callbacks import ParameterScope, editing
from kedit_train.data.tokenise import collate, encode_prompt, pad_token_id
from kedit_train.evaluation import evaluate
from kedit_train.evaluation.probes import probes_of

FACTLM = Path(__file__).resolve().parents[3] / "shared" / "models" / "factlm"


class _LineBreak(StoppingCriteria):
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(["\n" in self.tokenizer.decode(row[-1:]) for row in input_ids])


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    said, stops = [], StoppingCriteriaList([_LineBreak(tokenizer)])
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            pad_token_id=pad_token_id(tokenizer),
            stopping_criteria=stops,
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        said.append(text.split("\n")[0].strip())
    return said


def edited(model: Any, tokenizer: Any, edits: EditDataset, epochs: int) -> None:
    """Train the edits in, so that the model has something new to say."""
    rows, pad_id = edits.encode(tokenizer), pad_token_id(tokenizer)
    with editing(model, [ParameterScope(0.9, "mlp.down_proj")], tokenizer=tokenizer) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(rows)).split(64):
                edit.before_step()
                model(**collate([rows[i] for i in batch], pad_id=pad_id)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6, help="training between the two evaluations")
    parser.add_argument("--single", type=int, default=100, help="records to ask one prompt at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FACTLM).eval(), AutoTokenizer.from_pretrained(FACTLM)
    edits = EditDataset.load(FACTLM / "records.json", limit=arguments.records)
    some = edits[: arguments.single]
    prompts = [asked.prompt for i, edit in enumerate(some) for asked in probes_of(edit, str(i))]
    print(f"{len(edits)} records, one at a time {len(some)} of them with {len(prompts)} prompts; one thread\n")
    print("| model | how | records/s of CPU time | times as fast | same answers |")
    print("|---|---|---:|---:|---:|")
    before = None
    for state in ("unedited", "edited"):
        if before is not None:
            edited(model, tokenizer, edits, arguments.epochs)
            model.eval()
        began = time.process_time()
        single = one_at_a_time(model, tokenizer, prompts)
        slow = (time.process_time() - began) / len(some)
        print(f"| {state} | one at a time, generated only | {1 / slow:.1f} | 1.0 | |")
        for name, full in (("`evaluate`, core", False), ("`evaluate(full=True)`", True)):
            if full and before is not None:
                continue
            began = time.process_time()
            report = evaluate(model, tokenizer, edits, before=before, full=full, progress=False)
            fast = (time.process_time() - began) / len(edits)
            own = dict(zip([row.prompt for row in report.answers], [row.answer for row in report.answers], strict=True))
            same = "" if full else f"{sum(own[p] == s for p, s in zip(prompts, single, strict=True))} of {len(prompts)}"
            print(f"| {state} | {name} | {1 / fast:.1f} | {slow / fast:.1f} | {same} |", flush=True)
            if not full:
                first = report
        before = first
        print(f"| | reliability {first.flat()['edit/reliability']:.3f}, near ties {first.meta['near_ties']} | | | |")


if __name__ == "__main__":
    main()
