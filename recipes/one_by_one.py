"""Train edits one after the other, each alone, in one process.

    python recipes/one_by_one.py
    python recipes/one_by_one.py --model Qwen/Qwen3-0.6B --edits edits.jsonl --texts keep.txt
    python recipes/one_by_one.py --plain          # without KLLocality and NormBall; locality is then 0.79

Expected: reliability 0.95 to 1.00, generality 0.88 to 0.98, locality 0.90 to 1.00; 69 s (2026-11-27).
These are the scores on the 24 bundled edits. docs/results.md has scores on longer sequences of edits.

``--keep`` chooses how the answers to other prompts are kept. The default is ``null_space`` for pretrained models and
``kl`` for the bundled model.

With ``--keep subject_values``, ``SubjectValues`` trains what a few early layers add at the subject of each edit. It
keeps the outputs of these layers at the subjects of earlier edits. No learning rate is needed. This option needs a
pretrained model and edits with subjects.

With ``--keep null_space``, ``NullSpace`` reads the texts before the first edit. After each edit, it also reads that
edit. Later edits then hardly change the outputs of the edited layers on the texts and on the earlier edits. No learning
rate is needed.

With ``--subject_tokens``, the weights are trained only at the tokens of the subject of each edit. The model then gives
the new answer to more rephrased prompts. This option needs a pretrained model and edits with subjects.

With ``--keep kl``, ``KLLocality`` keeps the predictions of the unedited model on the texts, and the answers of all
earlier edits. ``NormBall`` keeps the weights within a ball around the unedited weights. With many edits, the ball
protects knowledge that the texts do not contain. For models with a few million parameters, ``kl`` is better than
``null_space``.

If you can train the edits together, use kedit_default.yaml or sequential.yaml. With many edits, these recipes give
better scores.

After 1, 10, 100 and 1,000 edits, and after the last edit, the script measures the scores of all edits so far. At the
end, it prints these scores as a table, and writes retention.png, report.json, report.html and edit.safetensors. Use
`kedit apply` to apply edit.safetensors to the base model. If you stop the script early, edit.safetensors contains the
edits that were trained so far.
"""

from __future__ import annotations

import argparse
import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from kedit_train import EditDelta, world
from kedit_train.atomic_write import check_writable
from kedit_train.callbacks import (
    EditCallback,
    KLLocality,
    NormBall,
    NullSpace,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    StopWhenEdited,
    SubjectTokens,
    SubjectValues,
    Texts,
    TokenLoss,
)
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.modes import TrainLoop, run_edits
from kedit_train.pretrained import load_model

# Maximum number of epochs of each edit, which is also the maximum number of steps.
EPOCHS = 40
KL, NULL_SPACE, SUBJECT_VALUES = "kl", "null_space", "subject_values"
# Radius of the ball around the original weights, as a fraction of the norm of these weights.
BALL = 0.5
LEARNING_RATE, TEXTS_PER_STEP = 6e-4, 8
DELTA, REPORT, PAGE, PICTURE = "edit.safetensors", "report.json", "report.html", "retention.png"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train edits one after the other, each alone.")
    parser.add_argument("--model", default=world.NAME, help="a hub name, a folder, or world (default)")
    parser.add_argument(
        "--edits", default=world.NAME, help="a file of edits to train in this order, or world (default)"
    )
    parser.add_argument(
        "--texts", help="a file of texts on which the model should not change (world has its own texts)"
    )
    parser.add_argument(
        "--keep",
        choices=[KL, NULL_SPACE, SUBJECT_VALUES],
        help="how to keep other answers; default: kl for the bundled model, null_space for other models",
    )
    parser.add_argument(
        "--subject_tokens",
        action="store_true",
        help="for null_space: train only at the tokens of the subject; the edits need a subject",
    )
    parser.add_argument("--texts_per_step", type=int, help="for kl: texts of the penalty per step; default: 8")
    parser.add_argument(
        "--output_dir", default="runs/one_by_one", help="folder for the results; default: runs/one_by_one"
    )
    parser.add_argument("--learning_rate", type=float, help="for kl; default: 6e-4")
    parser.add_argument(
        "--ball", type=float, help="for kl: radius of the ball, as a fraction of the norm of the weights; default: 0.5"
    )
    parser.add_argument("--limit", type=int, help="number of edits (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices; default: 0")
    parser.add_argument("--plain", action="store_true", help="train without constraints")
    return parser.parse_args(given)


def learning() -> list[EditCallback]:
    """Return the callbacks that train an edit."""
    return [
        ParameterScope("0.3-1.0", modules="mlp.down_proj"),
        TokenLoss(reduction="sample"),
        StopWhenEdited(loss=0.005),
    ]


def constraints(texts: str, ball: float, seed: int = 0, texts_per_step: int = TEXTS_PER_STEP) -> list[EditCallback]:
    """Return the callbacks that keep other answers. Use the same instances for all edits of a sequence."""
    # The weight is ten times the weight for a batch of edits. In a batch, the gradients of the edits partly cancel each
    # other. The gradient of a single edit does not cancel, so it needs a stronger penalty.
    return [
        KLLocality(Texts(texts, seed=seed), weight=200.0, batch_size=texts_per_step, sequential=True),
        NormBall(norm="l2", per="scope", fraction=ball),
    ]


def null_space(texts: str, seed: int = 0, subject_tokens: bool = False) -> list[EditCallback]:
    """Return the callbacks that train an edit with PolyakStep and keep other answers with NullSpace."""
    return [
        *([SubjectTokens()] if subject_tokens else []),
        ParameterScope("0.5-0.8", modules="mlp.down_proj"),
        TokenLoss(reduction="sample"),
        StopWhenEdited(loss=0.01),
        NullSpace(Texts(texts, seed=seed), sequential=True, neighbors=24),
        # A single edit is trained in 10 to 20 steps. A batch of edits needs shorter steps.
        PolyakStep(0.2),
        PrefixCache(),
    ]


def subject_values(texts: str, seed: int = 0) -> list[EditCallback]:
    """Return the callbacks that train what the layers add at the subject of an edit."""
    return [
        ParameterScope("0.14-0.29", modules="mlp.down_proj"),
        TokenLoss(reduction="sample"),
        StopWhenEdited(loss=0.05),
        SubjectValues(Texts(texts, seed=seed), sequential=True, step_size=0.25),
        PrefixCache(),
    ]


def kept_by(given: argparse.Namespace) -> str | None:
    """Return how other answers are kept: "kl", "null_space", "subject_values", or None with ``--plain``."""
    if given.plain:
        return None
    return given.keep or (KL if given.model == world.NAME else NULL_SPACE)


def callbacks(given: argparse.Namespace) -> list[EditCallback]:
    """Return the callbacks of all edits."""
    texts, way = given.texts or world.NAME, kept_by(given)
    if way == NULL_SPACE:
        return null_space(texts, given.seed, given.subject_tokens)
    if way == SUBJECT_VALUES:
        return subject_values(texts, given.seed)
    if way is None:
        return learning()
    ball = BALL if given.ball is None else given.ball
    return [*learning(), *constraints(texts, ball, given.seed, given.texts_per_step or TEXTS_PER_STEP)]


def check(given: argparse.Namespace) -> None:
    """Check the arguments before the model is loaded."""
    for name in ("learning_rate", "ball", "limit"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            raise EditError(f"--{name} must be > 0, got {value:g}.")
    if given.texts_per_step is not None and given.texts_per_step < 2:
        # A batch of the penalty contains texts and earlier edits.
        raise EditError(f"--texts_per_step must be >= 2, got {given.texts_per_step}.")
    if given.texts not in (None, world.NAME) and not Path(given.texts).is_file():
        raise EditError(f"--texts must be a file that exists, got {given.texts!r}.")
    if given.plain and (given.texts, given.ball, given.keep) != (None, None, None):
        raise EditError("--plain trains without constraints, so --texts, --ball and --keep must be left out.")
    for name in ("learning_rate", "ball", "texts_per_step"):
        if getattr(given, name) is not None and kept_by(given) != KL:
            raise EditError(
                f"--{name} is an option of --keep kl, but --keep is {kept_by(given)}; leave it out, or set --keep kl."
            )
    if kept_by(given) == SUBJECT_VALUES and given.model == world.NAME:
        raise EditError(
            "--keep subject_values needs a pretrained model, because the bundled model does not look up facts at the "
            "subject; set --model to a pretrained model, or set --keep to another value."
        )
    if given.subject_tokens and kept_by(given) != NULL_SPACE:
        raise EditError(
            "--subject_tokens needs --keep null_space and a pretrained model; leave it out, or set --keep null_space."
        )
    if not given.plain and given.texts is None and (given.model, given.edits) != (world.NAME, world.NAME):
        raise EditError(
            "--texts is missing; give a file of texts on which the predictions of your model should not change "
            "(.txt, one text per line). "
            "The bundled texts fit only the bundled model and edits."
        )
    for name in (DELTA, REPORT, PAGE, PICTURE):
        check_writable(Path(given.output_dir) / name)
    if find_spec("matplotlib") is None:
        raise EditError("plots need matplotlib; install it with pip install 'kedit-train[report]'.")


def main(command_line: list[str] | None = None) -> None:
    given = arguments(command_line)
    check(given)
    out = Path(given.output_dir)
    edits = EditDataset.load(given.edits, limit=given.limit)
    model, tokenizer = load_model(given.model)
    base = copy.deepcopy(model)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    options = {"epochs": EPOCHS, "learning_rate": given.learning_rate or LEARNING_RATE, "stop_loss": 0.0}
    loop = TrainLoop(tokenizer, callbacks=callbacks(given), **options)
    finished = False
    try:
        result = run_edits(model, tokenizer, edits, mode="sequential", train=loop, seed=given.seed)
        finished = True
    finally:
        delta = EditDelta.between(base, model.cpu(), edits=edits if finished else None)
        if delta.changes:
            delta.save(out / DELTA)
    result.report.save(out / REPORT)
    result.save(out / PAGE)
    result.save(out / PICTURE)
    print(result.markdown())
    for answer in result.report.answers:
        if answer.question == "reliability" and not answer.right:
            print(f"not learned: {answer.prompt!r} (the model answers {answer.answer!r})")


if __name__ == "__main__":
    try:
        main()
    except EditError as error:
        sys.exit(f"error: {error}")
