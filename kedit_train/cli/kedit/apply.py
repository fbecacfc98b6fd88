"""``kedit apply``: write the edited checkpoint from a delta and its base model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.cli.kedit.output import check_new_folder, json_option, naming_models, print_json, size
from kedit_train.errors import EditError
from kedit_train.plural import plural

DTYPES = ("float32", "bfloat16", "float16")
HELP = "write the edited checkpoint from a delta and its base model"
EPILOG = """\
examples:
  kedit apply runs/mine/edit.safetensors Qwen/Qwen3-0.6B runs/mine/model
  kedit apply runs/mine/edit.safetensors world runs/mine/model
  kedit apply runs/mine/edit.safetensors Qwen/Qwen3-0.6B runs/mine/model --dtype float32

The checkpoint is written shard by shard, with one tensor in memory at a time. The delta contains the SHA-256 of each
base tensor that it changes. Before anything is written, the command checks that the tensors of MODEL have these hashes.

If the training run loaded a half-precision checkpoint in float32, add --dtype float32. The command then loads the full
model in float32.
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "delta", metavar="DELTA", help="a delta: the weight change of an edit, saved by SaveDelta or kedit merge"
    )
    parser.add_argument("model", metavar="MODEL", help="the base model: a checkpoint folder, a hub name, or world")
    parser.add_argument("out", metavar="OUT", help="a new folder for the edited checkpoint")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="load the base model in this dtype; give the dtype in which the training run loaded the model "
        "(default: as stored)",
    )
    json_option(parser)


def run(args: Namespace) -> int:
    check_new_folder(args.out)
    from kedit_train.cli.kedit.checkpoints import folder_of
    from kedit_train.core.gate.adapter_source import gated_folder
    from kedit_train.delta import EditDelta

    if gated_folder(args.delta) is not None:
        raise EditError(
            f"{args.delta} is a gated adapter, which acts on some inputs only, so it cannot be written as the weights "
            "of a checkpoint; load the folder with kedit_train.load_model, or evaluate it with kedit eval."
        )
    delta, folder = EditDelta.load(args.delta), folder_of(args.model)
    with naming_models(args.delta, delta.meta, args.model):
        if args.dtype is None:
            _check_dtypes(delta, folder)
            out = delta.apply_to_checkpoint(folder, args.out)
        else:
            out = _apply_in_memory(delta, folder, Path(args.out), args.dtype)
    if args.json:
        print_json({"out": str(out), "state": "edited", "tensors": len(delta), "bytes": delta.nbytes})
        return 0
    print(f"edited model: {out} ({plural(len(delta), 'tensor')} changed, delta of {size(delta.nbytes)})")
    print(f"evaluate the edited model with: kedit eval {out} EDITS --against {args.model}")
    return 0


def _check_dtypes(delta: Any, folder: Path) -> None:
    from kedit_train.delta.weight_source import shards_of

    stored = {name: span.dtype for spans in shards_of(folder).values() for name, span in spans.items()}
    for name, change in delta.changes.items():
        dtype = next((stored[alias] for alias in (name, *change.tied) if alias in stored), change.dtype)
        if dtype != change.dtype:
            run_dtype, checkpoint_dtype = (str(one).removeprefix("torch.") for one in (change.dtype, dtype))
            advice = f"add --dtype {run_dtype} to load the model in the dtype of the training run."
            if run_dtype not in DTYPES:
                advice = "the training run edited a quantized model, so train again without quantization."
            raise EditError(
                f"the training run edited {name} in {run_dtype}, but the checkpoint stores this tensor in "
                f"{checkpoint_dtype}; "
                f"{advice}"
            )


def _apply_in_memory(delta: Any, folder: Path, out: Path, dtype: str) -> Path:
    """Load the base model, apply the delta and save the edited model.

    The folder ``out`` appears only when all its files are complete.
    """
    from kedit_train.cli.kedit.checkpoints import load

    model, tokenizer = load(str(folder), dtype)
    delta.apply(model)
    with writing(out) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return out
