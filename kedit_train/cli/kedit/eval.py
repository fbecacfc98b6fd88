"""``kedit eval``: did it take, and what else changed? For any checkpoint, hub name or delta, whoever edited it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import print_json, write_text
from kedit_train.errors import EditError

HELP = "ask a model what it was edited to answer, and what it was to leave alone"
EPILOG = """\
examples:
  kedit eval world world --limit 50
  kedit eval runs/mine/model edits.jsonl --against Qwen/Qwen3-0.6B
  kedit eval Qwen/Qwen3-0.6B counterfact.json --delta runs/mine/edit.safetensors --full
  kedit eval runs/mine/edit.safetensors edits.jsonl --against Qwen/Qwen3-0.6B         the same, by the delta's name
  kedit eval runs/mine/adapter edits.jsonl --against Qwen/Qwen3-0.6B                  a PEFT adapter, on its own base
  kedit eval runs/mine/model edits.jsonl --against before.json --json after.json
  kedit eval runs/mine/model world --against world --markdown eval.md --plots plots --card runs/mine/model/README.md

Without --against, locality is scored against the truth; with it, as "the same answer as before".
"""


def arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint, a PEFT adapter, a hub name, world, or a delta (with --against)")
    add("edits", metavar="EDITS", help=".json, .jsonl or .csv in any format of EditDataset, or world")
    add("--against", metavar="BASE", help="the unedited model, or the JSON report of its evaluation")
    add("--delta", metavar="FILE", help="apply this delta to MODEL, and compare with MODEL before")
    add("--full", action="store_true", help="every measure: prefixes, format, KL, old answers, fluency, weight drift")
    add("--limit", type=int, metavar="N", help="a seeded sample of N edits")
    add("--batch-size", type=int, default=64, metavar="N", help="rows at a time (64); no score depends on it")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="where an endless answer is cut (32)")
    add("--prompt-format", choices=("plain", "chat", "question"), default="plain")
    add("--texts", metavar="FILE", help="unrelated texts, for the perplexity")
    add("--seed", type=int, default=0, help="of the sample and the intervals (0)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="the checkpoint's own")
    add("--device", help="cpu, cuda, ...; the accelerator where there is one")
    add("--trust-remote-code", action="store_true", help="let the checkpoint bring its own code")
    add("--json", nargs="?", const="-", metavar="F", help="the report with every answer, as JSON; printed without F")
    add("--markdown", metavar="F", help="write the report as Markdown")
    add("--plots", metavar="DIR", help="write PNG plots into this folder")
    add("--card", metavar="F", help="put a section into this model card")


def run(args: Namespace) -> int:
    model, delta_file = args.model, args.delta
    if Path(model).is_file():
        if delta_file is not None or args.against is None or _is_report(args.against):
            raise EditError(f"{model} is a file: a delta is asked with its base, kedit eval DELTA EDITS --against BASE")
        model, delta_file, args.against = args.against, model, None
    if delta_file is not None and args.against not in (None, model):
        raise EditError("--delta compares MODEL before it with MODEL after it: leave --against out")
    if args.json not in (None, "-") and Path(args.json).suffix != ".json":
        raise EditError(f"--json {args.json}: end the file's name in .json")
    for option, place in (("json", args.json), ("markdown", args.markdown), ("plots", args.plots), ("card", args.card)):
        if place not in (None, "-"):
            _writable(f"--{option} {place}", Path(place) if option == "plots" else Path(place).parent)
    from kedit_train.data import EditDataset
    from kedit_train.delta import EditDelta
    from kedit_train.evaluation.reporting import plots

    if args.plots:
        # A missing matplotlib is told before the answers are generated.
        plots.figure(1, 1)
    edits = EditDataset.load(args.edits)
    delta = None if delta_file is None else EditDelta.load(delta_file)
    report = _evaluated(args, model, edits, delta)
    report = replace(report, meta={**report.meta, "model": model, "delta": delta_file, "against": args.against})
    _written(args, report, delta, Path(delta_file).stem if delta_file else Path(model).name)
    return 0


def _writable(given: str, folder: Path) -> None:
    """Make the folder now: after the answers are generated is late to say that there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(f"{given}: the folder {folder} cannot be made ({error.strerror})") from error


def _is_report(name: str) -> bool:
    return name.endswith(".json")


def _evaluated(args: Namespace, name: str, edits: Any, delta: Any) -> Any:
    from kedit_train.cli.kedit.checkpoints import load_for, merged
    from kedit_train.evaluation import Report, evaluate
    from kedit_train.evaluation.scoring.weight_drift import weight_drift

    how: dict[str, Any] = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "limit": args.limit}
    how |= {"prompt_format": args.prompt_format, "seed": args.seed, "texts": args.texts, "full": args.full}
    before, reference = None, None
    if args.against is not None and _is_report(args.against):
        before = Report.load(args.against)
        if args.full:
            raise EditError("--full compares with what the unedited model expects, which no file holds: --against BASE")
    elif args.against is not None and delta is None:
        _same_architecture(args.against, name, args.trust_remote_code)
        base, tokenizer = load_for(args, args.against, args.dtype)
        before = evaluate(base, tokenizer, edits, **how)
        # A second model in memory for the drift only.
        reference = merged(base).cpu() if args.full else None
        del base
    dtype = args.dtype
    if delta is not None and dtype == "auto":
        # Weights have to be those that the run began with, to the last bit.
        dtype = next((str(c.dtype).removeprefix("torch.") for c in delta.changes.values()), dtype)
    model, tokenizer = load_for(args, name, dtype)
    if delta is not None:
        if delta.verify(model) == "edited":
            raise EditError(f"{name} has the delta applied already: give its base, or leave the delta out")
        before = evaluate(model, tokenizer, edits, **how)
        named = dict(model.named_parameters())
        reference = {one: named[one].detach().clone() for one in delta.changes if one in named} if args.full else None
        delta.apply(model)
    report = evaluate(model, tokenizer, edits, before=before, **how)
    if reference is None:
        return report
    # Only now, when all is asked: an adapter has to go into the weights for this.
    return replace(report, metrics={**report.metrics, "weight_drift": weight_drift(merged(model), reference)})


def _same_architecture(base: str, model: str, trust: bool) -> None:
    """Refuse a base of another architecture before anything is generated."""
    from transformers import AutoConfig

    from kedit_train.cli.kedit.checkpoints import adapted_base, world_or

    names = [world_or(adapted_base(name) or name) for name in (base, model)]
    try:
        found = [AutoConfig.from_pretrained(name, trust_remote_code=trust) for name in names]
    except (OSError, ValueError, KeyError):
        return  # loading says what is wrong with it
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        was, now = (getattr(config.get_text_config(), key, None) for config in found)
        if was != now:
            raise EditError(
                f"{base} is no base of {model}: {key} is {was} in the one and {now} in the other; give the model "
                "before its edit"
            )


def _written(args: Namespace, report: Any, delta: Any, label: str) -> None:
    from kedit_train.evaluation.reporting import model_card as card
    from kedit_train.evaluation.reporting import plots

    if args.json == "-":
        print_json(report.to_dict())
    else:
        report.print()
        if missing := card.without_probes(report):
            print(f"no probes: {', '.join(missing)} (these edits bring none, so there is no score)")
    files, left = [], []
    if args.json not in (None, "-"):
        files.append(report.save(args.json))
    if args.markdown:
        files.append(write_text(args.markdown, report.markdown() + "\n"))
    if args.plots:
        for name in ("reliability_locality", "positions"):
            try:
                files.append(getattr(plots, name)({label: report}, Path(args.plots) / f"{name}.png"))
            except EditError as error:
                left.append(f"no {name}.png: {error}")
    if args.card:
        base = args.against if args.against and not _is_report(args.against) else None
        files.append(card.put(args.card, card.section(report, delta=delta, base=base)))
    if args.json != "-":
        for line in (*left, *(f"written: {path}" for path in files)):
            print(line)
