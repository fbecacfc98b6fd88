"""Edits per second at equal reliability: the time until the model generates at least 95 % of the new answers.

    python tests/benchmarks/equal_reliability.py                       # 12 layers, width 768, random weights
    python tests/benchmarks/equal_reliability.py --model factlm        # a model that knows the old facts
    python tests/benchmarks/equal_reliability.py --tune                # epochs needed at several learning rates

One down-projection matrix at three quarters of the depth is trained on records of CounterFact. The clock runs during
training only, including the start of the loop; after each epoch it stops for an evaluation. The one-at-a-time loop is
evaluated right after each edit, before the next edit starts from the unedited weights, which is the most favorable way
to count. Each method uses the fastest of the learning rates tried (``--tune``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from paired import Stepwise, Taken, arguments, clock, ratios, record, spread, table
from torch.utils.data import RandomSampler
from workload import (
    FACTLM,
    counterfact,
    distinct,
    edited_layer,
    llama,
    matrix,
    one_edit,
    plain_loop,
    plain_trainer,
    sft,
)

from kedit_train import EditDataset, evaluate
from kedit_train.callbacks import ActiveSet, ParameterScope, PrefixCache, TokenLoss, TokenSmoothing
from kedit_train.data import Edit
from kedit_train.data.length_buckets import LengthBuckets
from kedit_train.data.tokenization import Encoded, collate
from kedit_train.evaluation import EvaluationOptions

ENOUGH = 0.95
# Number of edits that are checked first, to see whether a full evaluation is worthwhile.
SAMPLE = 16


@dataclass(frozen=True)
class Setting:
    """A model and its edits, with the fastest learning rates of those tried."""

    model: Any
    tokenizer: Any
    edits: list[Edit]
    rows: list[Encoded]
    layer: int
    batch_size: int
    stock_lr: float
    ours_lr: float
    single_lr: float

    def fresh(self) -> Any:
        """Return a copy with its own trained matrix; everything else is shared."""
        own = matrix(self.model, self.layer)
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters() if p is not own})


def setting(options: argparse.Namespace) -> Setting:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not FACTLM.exists():
        raise SystemExit(f"this benchmark needs the tokenizer of factlm at {FACTLM}")
    tokenizer = AutoTokenizer.from_pretrained(FACTLM)
    if options.model == "factlm":
        model = AutoModelForCausalLM.from_pretrained(FACTLM, dtype=torch.float32).train()
        edits = distinct(EditDataset.load(FACTLM / "records.json"), options.edits)
        rates = {"batch_size": 32, "stock_lr": 1e-2, "ours_lr": 1e-2, "single_lr": 1e-2}
    else:
        model = llama("tiny" if options.quick else "small", options)
        edits = counterfact(options.edits)
        rates = {"batch_size": 8, "stock_lr": 5e-3, "ours_lr": 1e-2, "single_lr": 1e-2}
    layer = edited_layer(model)
    model.requires_grad_(False)
    matrix(model, layer).requires_grad_(True)
    rows = edits.encode(tokenizer)
    bare = [Edit(prompt=edit.prompt, target=edit.target) for edit in edits]
    return Setting(model.to(options.device), tokenizer, bare, rows, layer, **rates)


def reliability(model: Any, given: Setting, edits: Sequence[Edit]) -> float:
    report = evaluate(model, given.tokenizer, edits, options=EvaluationOptions(max_new_tokens=16), progress=False)
    return report.metrics["reliability"]["generated"].value


@torch.no_grad()
def forced(model: Any, given: Setting) -> float:
    """Return the fraction of some edits for which all target tokens and end-of-text are the most probable tokens."""
    batch = collate(given.rows[:SAMPLE], pad_id=given.tokenizer.pad_token_id)
    labels = batch.pop("labels")[:, 1:]
    said = model(**{name: value.to(model.device) for name, value in batch.items()}).logits[:, :-1].argmax(-1).cpu()
    return float(((said == labels) | (labels == -100)).all(1).float().mean())


@dataclass(frozen=True)
class Outcome:
    """The result of a method: seconds per edit, reliability, and epochs or steps."""

    seconds: float
    reliability: float
    rounds: float
    steps: int


@contextmanager
def stepper(host: str, model: Any, given: Setting, callbacks: list[Any], lr: float, options: Any) -> Iterator[Any]:
    common: dict[str, Any] = {"callbacks": callbacks, "lr": lr, "batch_size": given.batch_size}
    if host == "loop":
        lengths = [len(row.input_ids) for row in given.rows]

        def buckets() -> Iterator[Sequence[int]]:
            return iter(LengthBuckets(RandomSampler(given.rows), given.batch_size, False, lengths))

        with plain_loop(model, given.rows, given.tokenizer.pad_token_id, batches=buckets, **common) as step:
            yield step
        return
    build = sft if host == "SFTTrainer" else plain_trainer
    step = Stepwise(build(model, given.rows, given.tokenizer, options, **common))
    try:
        yield step
    finally:
        step.close()


def together(given: Setting, host: str, callbacks: Callable[[], list[Any]], lr: float, options: Any) -> Outcome:
    """Train epochs over all edits until they are reliable."""
    now, model, seconds, steps, reached = clock(options), given.fresh(), 0.0, 0, 0.0
    torch.manual_seed(options.seed)
    epoch = 0
    with ExitStack() as stack:
        started = now()
        # A plain loop starts here and a trainer within its first step; creating a trainer and its data is not counted.
        step = stack.enter_context(stepper(host, model, given, callbacks(), lr, options))
        seconds += now() - started if host == "loop" else 0.0
        while reached < ENOUGH and epoch < options.epochs:
            epoch += 1
            started = now()
            for _ in range(-(-len(given.rows) // given.batch_size)):
                step()
                steps += 1
            seconds += now() - started
            # The evaluation is slow, although this clock does not count it. An edit that fails with teacher forcing
            # also fails in generation.
            if forced(model, given) > 0.85 or epoch == options.epochs:
                reached = reliability(model, given, given.edits)
    return Outcome(seconds / len(given.edits), reached, epoch, steps)


def one_at_a_time(given: Setting, good: float | None, lr: float, options: Any, count: int) -> Outcome:
    """Run the one-at-a-time loop on the first ``count`` edits, each from the unedited weights."""
    now, model, seconds, steps, right = clock(options), given.fresh(), 0.0, 0, 0.0
    weight = matrix(model, given.layer)
    before = weight.detach().clone()
    for row, edit in zip(given.rows[:count], given.edits[:count], strict=True):
        started = now()
        with torch.no_grad():
            weight.copy_(before)
        for _ in one_edit(model, weight, row, lr=lr, good=good):
            steps += 1
        seconds += now() - started
        right += reliability(model, given, [edit])
    return Outcome(seconds / count, right / count, steps / count, steps)


def methods(given: Setting, options: Any) -> dict[str, Callable[[], Outcome]]:
    def single(good: float | None) -> Outcome:
        return one_at_a_time(given, good, given.single_lr, options, options.single)

    def ours(host: str, lr: float, *extra: Callable[[], Any]) -> Callable[[], Outcome]:
        def callbacks() -> list[Any]:
            return [ParameterScope(given.layer, modules="mlp.down_proj"), *(make() for make in extra)]

        return lambda: together(given, host, callbacks, lr, options)

    # The same objective as (b), so that the number of epochs is equal and only their cost differs.
    same = given.stock_lr, lambda: TokenLoss()
    smoothed = given.ours_lr, TokenSmoothing
    return {
        "(e) one edit at a time, 25 steps": lambda: single(None),
        "(e) the same, ended at a loss of 0.01": lambda: single(0.01),
        "(b) stock SFTTrainer, frozen to the scope": lambda: together(
            given, "SFTTrainer", list, given.stock_lr, options
        ),
        "ours in SFTTrainer: loss head, cross-entropy": ours("SFTTrainer", *same),
        "ours in SFTTrainer: and PrefixCache": ours("SFTTrainer", *same, PrefixCache),
        "ours in Trainer: the same": ours("Trainer", *same, PrefixCache),
        "ours in a plain loop: the same, LengthBuckets": ours("loop", *same, PrefixCache),
        "ours in SFTTrainer: TokenSmoothing, PrefixCache": ours("SFTTrainer", *smoothed, PrefixCache),
        "ours in SFTTrainer: TokenSmoothing, PrefixCache, ActiveSet": ours(
            "SFTTrainer", *smoothed, PrefixCache, ActiveSet
        ),
    }


def tune(given: Setting, options: Any) -> None:
    """Print the epochs (one at a time: steps per edit) until reliable at several learning rates."""
    # Cross-entropy through the loss head with the cache trains like (b), in less time.
    for name, make in (("cross-entropy", lambda: TokenLoss()), ("TokenSmoothing", TokenSmoothing)):
        for lr in options.rates:
            epochs = []
            for seed in range(1, options.rounds + 1):
                options.seed = seed
                scope = ParameterScope(given.layer, modules="mlp.down_proj")
                outcome = together(given, "SFTTrainer", lambda s=scope, m=make: [s, m(), PrefixCache()], lr, options)
                epochs.append(f"{outcome.rounds:g} ({outcome.reliability:.3f})")
            print(f"{name}, lr {lr:g}: epochs (reliability) {', '.join(epochs)}", flush=True)
    for lr in options.rates:
        single = one_at_a_time(given, 1e-2, lr, options, options.single)
        print(f"one at a time, lr {lr:g}: {single.rounds:g} steps an edit, reliability {single.reliability:.3f}")


def main() -> None:
    parser = arguments(__doc__, edits=64, single=16, rounds=3, epochs=40)
    parser.add_argument("--model", choices=["small", "factlm"], default="small")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    options = parser.parse_args()
    if options.quick:
        options.edits, options.single, options.rounds, options.epochs = 8, 2, 1, 2
    given = setting(options)
    if options.tune:
        tune(given, options)
        return
    outcomes: dict[str, list[Outcome]] = {name: [] for name in methods(given, options)}
    for _ in range(options.rounds):
        # The number of epochs depends on the order of the edits.
        options.seed += 1
        for name, run in methods(given, options).items():
            outcomes[name].append(run())
            print(name, outcomes[name][-1], flush=True)
    taken: Taken = {name: [o.seconds for o in found] for name, found in outcomes.items()}
    single, _, stock, *_ = taken
    rows = []
    for name, seconds in taken.items():
        reached = min(o.reliability for o in outcomes[name])
        rows.append(
            [
                name,
                f"{1 / statistics.median(seconds):.2f}",
                spread(ratios(taken[single], seconds)),
                spread(ratios(taken[stock], seconds)),
                f"{reached:.3f}",
                f"{spread([o.rounds for o in outcomes[name]], 0)} {'steps' if name.startswith('(e)') else 'epochs'}",
            ]
        )
    what = f"{options.model}: {len(given.edits)} edits, batches of {given.batch_size}, layer {given.layer}"
    rates = (
        f"Learning rates: (e) {given.single_lr:g}, cross-entropy {given.stock_lr:g}, TokenSmoothing {given.ours_lr:g}"
    )
    body = f"{what}; (e) on {options.single} of them. {rates}.\n\n" + table(
        ["method", "edits/s", "times (e)", "times (b)", "reliability", "taken"], rows
    )
    record(f"Edits a second at equal reliability, {options.model}", body, options)


if __name__ == "__main__":
    main()
