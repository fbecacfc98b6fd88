"""Send the configuration of a run of ``fit`` to the loggers of the run, such as W&B."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import SaveConfigCallback

from kedit_train.cli.yaml_text import load_yaml


class LogRecipe(SaveConfigCallback):
    """Save the configuration of a run as a file, and log it as hyperparameters under the key ``recipe``.

    The configuration is the recipe with all arguments of the command line and all defaults.
    """

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        recipe = load_yaml(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams({"recipe": recipe})
