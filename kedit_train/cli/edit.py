"""The entry that all recipes share: LightningCLI with an edit's module and data as defaults.

    python -m kedit_train fit --config recipes/quickstart.yaml
    python -m kedit_train fit --config recipes/overtone.yaml --model.name Qwen/Qwen3-0.6B --data.path edits.jsonl
    python -m kedit_train fit --print_config
    python -m kedit_train sft --config recipes/overtone.yaml        in TRL: see ``kedit_train.cli.sft``

Any LightningModule and LightningDataModule can take their places by ``class_path``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from kedit_train import catalog, world
from kedit_train.cli.config_errors import shorten
from kedit_train.cli.console import leave, say_error
from kedit_train.cli.processes import check_world, follow_launcher, part
from kedit_train.errors import EditError
from kedit_train.modules import EditDataModule, EditModule

CONFIG = ("--config", "-c")
MODULE, DATA = (f"{cls.__module__}.{cls.__qualname__}" for cls in (EditModule, EditDataModule))


class EditParser(LightningArgumentParser):
    """Says in one line which key is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:
            # A class's own parser: what it says becomes part of the message that names the class.
            super().error(message, ex)
        say_error(shorten(message))
        leave(2)


class EditCLI(LightningCLI):
    """``fit`` with ``EditModule`` and ``EditDataModule`` unless told otherwise.

    The resolved configuration is written beside the run's logs as ``resolved.yaml``.
    """

    def __init__(self, parser_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        told = {"description": "Edit a model: fit in Lightning, sft in TRL's SFTTrainer (see sft --help)."}
        super().__init__(
            parser_class=EditParser,
            parser_kwargs=told | (parser_kwargs or {}),
            seed_everything_default=0,
            # "config.yaml" might be the file that the user started from.
            save_config_kwargs={"overwrite": True, "config_filename": "resolved.yaml"},
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # In this order they are built: a wrong argument or file is told before a large model is loaded.
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": MODULE}, "data": {"class_path": DATA}})

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        follow_launcher(config.trainer, os.environ)
        share_texts(config)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        check_world(trainer.world_size, os.environ)
        return trainer


def share_texts(config: Any) -> None:
    """Let ``data.texts`` take the place of ``texts: world`` in callbacks, and keep the world's to the world.

    Raises:
        EditError: the world's texts or prompts beside another model or other edits; ``data.texts`` that nobody reads.
    """
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    readers = [c for c in callbacks if c.get("init_args") and world.is_world(_source(c.init_args.get("texts")))]
    ours = {
        "model.name": config.model.init_args.name if config.model.class_path == MODULE else config.model.class_path,
        "data.path": config.data.init_args.path if config.data.class_path == DATA else config.data.class_path,
    }
    own = config.data.init_args if config.data.class_path == DATA else None
    foreign = " and ".join(f"{key}={value!r}" for key, value in ours.items() if not world.is_world(value))
    if own is not None and world.is_world(own.augmentation.replay) and foreign:
        raise EditError(
            f"data.augmentation.replay is world, prompts of the embedded world, and this run has {foreign}: name a "
            "file of prompts of other facts (.txt with one a line, or a file of edits): --data.augmentation.replay FILE"
        )
    if own is not None and own.texts is not None:
        if not readers:
            raise EditError(f"data.texts={own.texts!r} is read by nobody: no callback of this run has texts: world")
        for reader in readers:
            if isinstance(reader.init_args.texts, Namespace):
                reader.init_args.texts.source = own.texts
            else:
                reader.init_args.texts = own.texts
        # The configuration that is kept beside the run says it once, and runs again.
        if not world.is_world(own.texts):
            own.texts = None
        return
    if readers and foreign:
        name = readers[0].class_path.rpartition(".")[2]
        raise EditError(
            f"{name} has texts: world, facts of the embedded world, and this run has {foreign}: name a file of texts "
            "that your model should answer as before (.txt with one a line, .jsonl, .json): --data.texts FILE"
        )


def _source(texts: Any) -> Any:
    """Return the source of texts, which a configuration gives as it is or as the arguments of ``Texts``."""
    return texts.get("source") if isinstance(texts, Namespace) else texts


def with_catalog(arguments: Sequence[str]) -> list[str]:
    """Let ``--config callbacks/kl_locality.yaml`` name a packaged fragment where no such file lies in this folder."""
    found, takes_path = [], False
    for word in arguments:
        option, equals, value = word.partition("=")
        path = value if equals and option in CONFIG else word if takes_path else ""
        packaged = catalog.packaged(path) if path else None
        found.append(word if packaged is None else word[: len(word) - len(path)] + str(packaged))
        takes_path = word in CONFIG
    return found


def edit_error(error: BaseException | None) -> EditError | None:
    """The ``EditError`` behind an error: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, EditError):
        error = error.__cause__ or error.__context__
    return error


def quiet() -> None:
    """Leave out what libraries tell each other, Lightning of other products, and of choices that recipes make."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda row: "Tip:" not in row.getMessage())
    for noise in ("does not have many workers", "smaller than the logging interval", "isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", f".*{noise}.*")
    # trl 1.16 and peft 0.21 use a name that transformers 5.23 changes.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)


def main() -> None:
    """Run ``sys.argv``. Exit code 1 with one line for what cannot be done, 2 for arguments that are not understood.

    ``KEDIT_TRACEBACK=1`` shows where an error came from.
    """
    quiet()
    try:
        if sys.argv[1:2] == ["sft"]:
            from kedit_train.cli import sft

            sft.main(sys.argv[2:])
            return
        sys.argv = [sys.argv[0], *with_catalog(sys.argv[1:])]
        EditCLI()
    except (ValueError, MisconfigurationException) as error:
        ours = error if isinstance(error, MisconfigurationException) else edit_error(error)
        if ours is None or os.environ.get("KEDIT_TRACEBACK") == "1":
            raise
        say_error(str(ours))
        leave(1)
    part()
