"""The command ``python -m kedit_train``: ``fit`` runs a recipe in Lightning, ``sft`` runs a recipe in TRL.

The command ``lightning run RECIPE`` also runs a recipe with ``fit``.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException

from kedit_train.cli.console import leave, print_error
from kedit_train.cli.edit import EditCLI, edit_error, with_catalog
from kedit_train.cli.named_callbacks import split_by_name
from kedit_train.processes import end_process_group


def main() -> None:
    """Run the command with the arguments in ``sys.argv``.

    The exit code is 1 if the run fails and 2 if the arguments are not valid. In both cases, one line with the reason is
    printed. Set the environment variable ``KEDIT_TRACEBACK=1`` to see the traceback.
    """
    quiet()
    try:
        if sys.argv[1:2] == ["sft"]:
            # TRL is optional, so this module is imported only when it is needed.
            from kedit_train.cli import sft

            sft.main(sys.argv[2:])
            return
        words, named = split_by_name(with_catalog(sys.argv[1:]))
        sys.argv = [sys.argv[0], *words]
        EditCLI(named_arguments=named)
    except (ValueError, MisconfigurationException) as error:
        known = error if isinstance(error, MisconfigurationException) else edit_error(error)
        if known is None or os.environ.get("KEDIT_TRACEBACK") == "1":
            raise
        print_error(str(known))
        leave(1)
    end_process_group()


def quiet() -> None:
    """Hide messages that the user of a recipe can ignore, such as the tips of Lightning."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    for text in ("does not have many workers", "smaller than the logging interval", "isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", f".*{text}.*")
    # trl 1.16 and peft 0.21 use a name that transformers 5.23 renames.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
