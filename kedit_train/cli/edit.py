"""The command ``fit``: a LightningCLI with ``EditModule`` and ``EditDataModule`` as defaults.

    python -m kedit_train fit --config recipes/quickstart.yaml
    python -m kedit_train fit --config recipes/overtone.yaml --model.name Qwen/Qwen3-0.6B --data.path edits.jsonl
    python -m kedit_train fit --print_config

Set ``class_path`` under ``model`` or ``data`` to use another LightningModule or LightningDataModule.
"""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from kedit_train import catalog, world
from kedit_train.arguments import cut
from kedit_train.cli import yaml_text
from kedit_train.cli.config_errors import shorten, wrong_callback
from kedit_train.cli.console import leave, print_error
from kedit_train.cli.logged_recipe import LogRecipe
from kedit_train.cli.named_callbacks import Override, set_by_name, tell_last_callback
from kedit_train.cli.processes import follow_launcher
from kedit_train.cli.run_display import display_callbacks
from kedit_train.errors import EditError
from kedit_train.modules import EditDataModule, EditModule
from kedit_train.processes import check_process_count

CONFIG = ("--config", "-c")


class EditParser(LightningArgumentParser):
    """A parser that reports an error in one line, with the name of the wrong key.

    Args:
        arguments: arguments of ``LightningArgumentParser``.
        parser_mode: name of the jsonargparse mode that reads YAML. The default mode rejects YAML that would take
            unbounded time to read.
    """

    def __init__(self, *arguments: Any, parser_mode: str = yaml_text.MODE, **kwargs: Any) -> None:
        # The configuration file that is being read, for error messages.
        self._file: str | None = None
        super().__init__(*arguments, parser_mode=parser_mode, **kwargs)

    def parse_args(self, *arguments: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*arguments, **kwargs)
        except EditError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError) as error:
            # For some wrong values, jsonargparse raises one of these errors, and not its own error with the wrong key.
            reason = f"{type(error).__name__}: {error}"
            self.error(
                f"the configuration cannot be read ({reason}); compare it with the output of "
                "python -m kedit_train fit --print_config",
                error,
            )

    def parse_path(self, cfg_path: Any, *arguments: Any, **kwargs: Any) -> Any:
        self._file = str(cfg_path)
        try:
            return super().parse_path(cfg_path, *arguments, **kwargs)
        finally:
            self._file = None

    def validate(self, namespace: Any, *arguments: Any, **kwargs: Any) -> None:
        for name in self.groups or {}:
            value = namespace.get(name, Namespace())
            if not isinstance(value, Namespace | dict) and self._has_keys_only(name):
                raise TypeError(f"{name} must be a mapping of keys to values, got {reprlib.repr(value)}")
        super().validate(namespace, *arguments, **kwargs)

    def _has_keys_only(self, group: str) -> bool:
        """Return whether ``group`` must be a mapping, such as ``trainer``.

        jsonargparse itself also accepts another value, for example ``trainer: 5``.
        """
        try:
            self.get_default(group)
        except KeyError:
            return True
        return False

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:
            # This is the parser of one class. The parser of the command adds the name of the class to its message.
            super().error(message, ex)
        if self._file:
            print_error(f"{self._file}: {_wrong_callback_in(self._file) or shorten(message)}")
        else:
            print_error(shorten(message))
        leave(2)


class EditCLI(LightningCLI):
    """The ``fit`` command, with ``EditModule`` and ``EditDataModule`` as defaults.

    The resolved configuration is saved as ``resolved.yaml`` in the folder of the run. It is also sent to the loggers of
    the run, such as W&B, as hyperparameters under the key ``recipe``.

    Args:
        parser_kwargs: arguments of the parsers.
        named_arguments: the command-line options that name a callback by its class, such as
            ``--trainer.callbacks.KLLocality.texts FILE``. ``split_by_name`` returns these options.
        kwargs: arguments of ``LightningCLI``.
    """

    def __init__(
        self,
        parser_kwargs: dict[str, Any] | None = None,
        *,
        named_arguments: Sequence[Override] = (),
        **kwargs: Any,
    ) -> None:
        self.named_arguments = named_arguments
        description = "Edit a model. fit runs a recipe in Lightning. sft runs a recipe in TRL (see sft --help)."
        super().__init__(
            parser_class=EditParser,
            parser_kwargs={"description": description} | (parser_kwargs or {}),
            seed_everything_default=0,
            save_config_callback=LogRecipe,
            # The default name, config.yaml, might be the file that the user started from.
            save_config_kwargs={"overwrite": True, "config_filename": "resolved.yaml"},
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The model is built last, so that wrong arguments and files are reported before a large model is loaded.
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {"model": {"class_path": _path_of(EditModule)}, "data": {"class_path": _path_of(EditDataModule)}}
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        follow_launcher(config.trainer, os.environ)
        set_by_name(config.trainer.callbacks, self.named_arguments)
        tell_last_callback(sys.argv[1:], config.trainer.callbacks)
        share_texts(config)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config_init[str(self.subcommand)].trainer
        own = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks] if config.callbacks else []
        shown = config.enable_progress_bar is not False
        trainer = super().instantiate_trainer(callbacks=[*display_callbacks(own, progress=shown), *own], **kwargs)
        check_process_count(trainer.world_size)
        return trainer


def _wrong_callback_in(path: str) -> str | None:
    try:
        return wrong_callback(yaml_text.load_yaml(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml_text.InvalidYAML):
        # jsonargparse reports files that cannot be read.
        return None


def share_texts(config: Any) -> None:
    """Replace ``texts: world`` in the callbacks by the value of ``data.texts``. Without ``data.texts``, change nothing.

    Raises:
        EditError: ``data.texts`` is set, but no callback has ``texts: world``. The error is also raised if a callback
            keeps ``texts: world``, or if ``data.augmentation.replay`` is "world", and the model or the edits are not
            the bundled ones.
    """
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    readers = [c for c in callbacks if c.get("init_args") and world.is_world(_source(c.init_args.get("texts")))]
    model_is_own = class_of(config.model.class_path) is EditModule
    own = config.data.init_args if class_of(config.data.class_path) is EditDataModule else None
    ours = {
        "model.name": config.model.init_args.name if model_is_own else config.model.class_path,
        "data.path": config.data.class_path if own is None else own.path,
    }
    foreign = " and ".join(f"{key}={cut(repr(value))}" for key, value in ours.items() if not world.is_world(value))
    if own is not None and world.is_world(own.augmentation.replay) and foreign:
        raise EditError(
            "data.augmentation.replay='world' uses prompts that fit only the model and the edits that come with "
            f"kedit-train, but this run has {foreign}; add --data.augmentation.replay FILE, where FILE has prompts "
            "about facts that are not edited (a .txt file with one prompt per line, or a file of edits)."
        )
    if own is not None and own.texts is not None:
        if not readers:
            raise EditError(
                f"data.texts={cut(repr(own.texts))} is not used, because no callback of this run has the setting "
                "'texts: world', which data.texts would replace; remove data.texts, or add a callback with this "
                "setting."
            )
        for reader in readers:
            if isinstance(reader.init_args.texts, Namespace):
                reader.init_args.texts.source = own.texts
            else:
                reader.init_args.texts = own.texts
        # The callbacks now name the texts, so data.texts is removed from the saved configuration. If it stayed there, a
        # run of this configuration would fail, because no callback has "texts: world" any more.
        if not world.is_world(own.texts):
            own.texts = None
        return
    if readers and foreign:
        name = readers[0].class_path.rpartition(".")[2]
        raise EditError(
            f"{name} has the setting 'texts: world', which fits only the model and the edits that come with "
            f"kedit-train, but this run has {foreign}; add --data.texts FILE. On the texts in FILE (.txt with one text "
            "per line, .jsonl or .json), the predictions of your model should not change."
        )


def class_of(class_path: str) -> type:
    """Return the class that a class path names.

    One class may have several paths, so compare classes instead of paths.
    """
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _source(texts: Any) -> Any:
    """Return ``texts.source`` if ``texts`` configures a ``Texts`` object, and ``texts`` itself otherwise."""
    return texts.get("source") if isinstance(texts, Namespace) else texts


def with_catalog(arguments: Sequence[str]) -> list[str]:
    """Replace a ``--config`` path that does not exist, such as ``callbacks/kl_locality.yaml``, by the packaged file."""
    resolved, takes_path = [], False
    for word in arguments:
        option, equals, value = word.partition("=")
        path = value if equals and option in CONFIG else word if takes_path else ""
        packaged = catalog.packaged(path) if path else None
        resolved.append(word if packaged is None else word[: len(word) - len(path)] + str(packaged))
        takes_path = word in CONFIG
    return resolved


def edit_error(error: BaseException | None) -> EditError | None:
    """Return the ``EditError`` that caused ``error``, or None if the cause is not an ``EditError``.

    If a constructor raises an error, jsonargparse raises its own error with the constructor's error as the cause.
    """
    while error is not None and not isinstance(error, EditError):
        error = error.__cause__ or error.__context__
    return error
