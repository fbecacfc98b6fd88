"""``kedit eval``: measure reliability, generality, locality and other scores of an edited model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedit_train.cli.kedit.output import evaluation_options, loading_options, print_json, write_text
from kedit_train.errors import EditError

HELP = "evaluate a model on edits: whether it gives the new answers, and whether other answers stayed the same"
EPILOG = """\
examples:
  kedit eval world world --limit 50
  kedit eval runs/mine/model edits.jsonl --against Qwen/Qwen3-0.6B
  kedit eval Qwen/Qwen3-0.6B counterfact.json --delta runs/mine/edit.safetensors --full
  kedit eval runs/mine/edit.safetensors edits.jsonl --against Qwen/Qwen3-0.6B         a delta, applied to its base model
  kedit eval runs/mine/adapter edits.jsonl --against Qwen/Qwen3-0.6B                  a PEFT adapter (and its gate)
  kedit eval runs/mine/model edits.jsonl --against before.json --json after.json
  kedit eval runs/mine/model edits.jsonl --against Qwen/Qwen3-0.6B --protocol leading,wild --prose wiki.txt
  kedit eval runs/mine/model world --against world --html eval.html --plots plots --card runs/mine/model/README.md

With --against or --delta, locality is the fraction of answers that are the same as the answers of the base model.
Without these options, locality is the fraction of correct answers.
"""


def arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="checkpoint folder, PEFT adapter, hub name, or world (the bundled model); with --against also a delta",
    )
    add("edits", metavar="EDITS", help="a .json, .jsonl or .csv file of edits, or world (the bundled edits)")
    add("--against", metavar="BASE", help="the base model, or a JSON report of the base model's evaluation")
    add("--delta", metavar="FILE", help="apply this delta to MODEL, and compare the result with MODEL")
    add(
        "--full",
        action="store_true",
        help="also measure: generality with a prefix before the prompt and in another prompt format, the KL divergence "
        "from the base model, whether old answers return, fluency, the scores of --retrieval, the overlap of answers "
        "with the target, and weight drift",
    )
    add(
        "--protocol",
        default="auto",
        metavar="P",
        help="how answers are judged: auto, or one or more of leading, exact, contains, wild, teacher_forced and "
        "probability, separated by commas (default: auto)",
    )
    add("--retrieval", action="store_true", help="also measure the base model with the new fact in the prompt")
    evaluation_options(parser)
    add(
        "--prose",
        metavar="FILE",
        help="a file of unrelated texts. Three values are measured on the texts: the perplexity, the KL divergence "
        "from the base model, and the agreement with the base model",
    )
    add("--seed", type=int, default=0, help="random seed of the sample and of the confidence intervals (default: 0)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the model (default: auto)",
    )
    loading_options(parser)
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="F",
        help="write the report as JSON to this file; without a file name, print JSON",
    )
    add("--markdown", metavar="F", help="write the report as Markdown to this file")
    add("--html", metavar="F", help="write the report as an HTML page to this file")
    add("--plots", metavar="DIR", help="write PNG plots into this folder")
    add("--card", metavar="F", help="add the scores to this model card (a Markdown file)")


def run(args: Namespace) -> int:
    model, delta_file = args.model, args.delta
    if Path(model).is_file():
        if delta_file is not None or args.against is None or _is_report(args.against):
            raise EditError(
                f"MODEL must be a folder or a hub name, got the file {model}; to evaluate a delta file, use kedit eval "
                "DELTA EDITS --against BASE, where BASE is the unedited model, and leave out --delta."
            )
        model, delta_file, args.against = args.against, model, None
    if delta_file is not None and args.against not in (None, model):
        raise EditError(
            "--delta already compares MODEL with and without the delta; remove --against, or remove --delta."
        )
    if args.json not in (None, "-") and Path(args.json).suffix != ".json":
        raise EditError(f"the file name after --json must end with .json, got {args.json}.")
    for option in ("json", "markdown", "html", "plots", "card"):
        place = getattr(args, option)
        if place not in (None, "-"):
            _make_folder(f"--{option} {place}", Path(place) if option == "plots" else Path(place).parent)
    from kedit_train.data import EditDataset
    from kedit_train.delta import EditDelta
    from kedit_train.evaluation.reporting import plots

    if args.plots:
        # This call reports a missing matplotlib before answers are generated.
        plots.new_figure(1, 1)
    edits = EditDataset.load(args.edits)
    delta = None if delta_file is None else EditDelta.load(delta_file)
    report = _evaluate(args, model, edits, delta)
    report = replace(report, meta={**report.meta, "model": model, "delta": delta_file, "against": args.against})
    _write(args, report, delta, Path(delta_file).stem if delta_file else Path(model).name)
    return 0


def _make_folder(option: str, folder: Path) -> None:
    """Create an output folder before the model generates answers, so that an error here loses no answers."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditError(
            f"{option}: the folder {folder} cannot be created ({error.strerror}); choose another folder."
        ) from error


def _is_report(name: str) -> bool:
    return name.endswith(".json")


def _evaluate(args: Namespace, name: str, edits: Any, delta: Any) -> Any:
    from kedit_train.cli.kedit.checkpoints import load_for, merged
    from kedit_train.core.gate.adapter_source import gated_folder
    from kedit_train.evaluation import EvaluationOptions, Report, evaluate
    from kedit_train.evaluation.scoring.weight_drift import BY_TENSOR, norms_by_tensor, tensor_drift, total_drift

    options: dict[str, Any] = {"limit": args.limit, "seed": args.seed}
    options["options"] = EvaluationOptions(
        metrics="all" if args.full else ["retrieval"] if args.retrieval else (),
        protocol=args.protocol.split(",") if "," in args.protocol else args.protocol,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        prose=args.prose,
        prompt_format=args.prompt_format,
    )
    for one in (name, args.against) if args.full else ():
        if one is not None and not _is_report(one) and gated_folder(one) is not None:
            raise EditError(
                f"--full measures weight drift, but {one} is a gated adapter, which cannot be merged into the weights; "
                "remove --full."
            )
    before, reference = None, None
    if args.against is not None and _is_report(args.against):
        before = Report.load(args.against)
        if args.full:
            raise EditError(
                f"--full needs the base model, but --against is the report {args.against}; give the base model instead "
                "of the report (--against BASE), or remove --full."
            )
        if args.retrieval and "retrieval" not in before.metrics:
            raise EditError(
                f"--against {args.against} is a report without the scores of --retrieval; give the base model instead "
                "of the report (--against BASE), or remove --retrieval."
            )
    elif args.against is not None and delta is None:
        _same_architecture(args.against, name, args.trust_remote_code)
        base, tokenizer = load_for(args, args.against, args.dtype)
        before = evaluate(base, tokenizer, edits, **options)
        # The base stays in memory only if weight drift is measured.
        reference = merged(base).cpu() if args.full else None
        del base
    dtype = args.dtype
    if delta is not None and dtype == "auto":
        # A delta can be applied only to weights that equal the weights before the training run, bit for bit. So the
        # model is loaded in the dtype of the training run.
        dtype = next((str(c.dtype).removeprefix("torch.") for c in delta.changes.values()), dtype)
    model, tokenizer = load_for(args, name, dtype)
    if delta is not None:
        if delta.verify(model) == "edited":
            raise EditError(
                f"the delta is already applied to the model {name!r}; give the unedited model instead, or leave out "
                "the delta."
            )
        before = evaluate(model, tokenizer, edits, **options)
        named = dict(model.named_parameters())
        reference = {one: named[one].detach().clone() for one in delta.changes if one in named} if args.full else None
        delta.apply(model)
    report = evaluate(model, tokenizer, edits, unedited=before, **options)
    if reference is None:
        return report
    # Weight drift is measured after all answers are generated, because this measurement merges an adapter into the
    # weights.
    drifts = tensor_drift(merged(model), reference)
    metrics = {**report.metrics, "weight_drift": total_drift(drifts)}
    return replace(report, metrics=metrics, meta={**report.meta, BY_TENSOR: norms_by_tensor(drifts)})


def _same_architecture(base: str, model: str, trust: bool) -> None:
    """Check that the base model has the same architecture as the edited model, before answers are generated."""
    from transformers import AutoConfig

    from kedit_train.cli.kedit.checkpoints import world_or
    from kedit_train.core.gate.adapter_source import adapted_base

    names = [world_or(adapted_base(name) or name) for name in (base, model)]
    try:
        configs = [AutoConfig.from_pretrained(name, trust_remote_code=trust) for name in names]
    except (OSError, ValueError, KeyError):
        return  # Loading the model will report the error.
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        old, new = (getattr(config.get_text_config(), key, None) for config in configs)
        if old != new:
            raise EditError(
                f"{base} is not the base of {model}, because {key} is {old} in {base} and {new} in {model}; use "
                "--against BASE, where BASE is the model before the edit."
            )


def _write(args: Namespace, report: Any, delta: Any, label: str) -> None:
    from kedit_train.evaluation.reporting import model_card as card
    from kedit_train.evaluation.reporting import plots

    if args.json == "-":
        print_json(report.to_dict())
    else:
        report.print()
        if missing := card.questions_without_probes(report):
            print(f"not measured: {', '.join(missing)} (the edits contain no questions for these scores)")
    files, skipped = [], []
    if args.json not in (None, "-"):
        files.append(report.save(args.json))
    if args.markdown:
        files.append(write_text(args.markdown, report.markdown() + "\n"))
    if args.html:
        files.append(write_text(args.html, report.html(delta=delta) + "\n"))
    if args.plots:
        for name in ("reliability_locality", "positions"):
            try:
                files.append(getattr(plots, name)({label: report}, Path(args.plots) / f"{name}.png"))
            except EditError as error:
                skipped.append(f"no {name}.png: {error}")
    if args.card:
        base = args.against if args.against and not _is_report(args.against) else None
        files.append(card.insert_section(args.card, card.model_card_section(report, delta=delta, base=base)))
    if args.json != "-":
        for line in (*skipped, *(f"saved: {path}" for path in files)):
            print(line)
