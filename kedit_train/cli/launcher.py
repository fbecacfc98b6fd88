"""The command ``lightning run``: start a recipe or a script on one or several processes.

The command uses the launcher of Lightning Fabric (``lightning.fabric.cli``), because Lightning 2.5.1 and later have no
``lightning`` command of their own. Verbs other than ``run`` are passed to ``lightning-sdk`` if that package is
installed.
"""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from kedit_train import catalog
from kedit_train.cli.console import ending_interrupts, print_error
from kedit_train.errors import EditError

HELP = """\
usage: lightning run [OPTIONS] RECIPE.yaml|SCRIPT.py [ARGUMENTS ...]

Start a recipe (a LightningCLI configuration) or a script on one or several processes.

examples:
  lightning run recipes/quickstart.yaml
  lightning run quickstart --devices 2                      a packaged recipe by name, on two processes
  lightning run overtone --model.name Qwen/Qwen3-0.6B --data.path edits.jsonl --trainer.max_epochs 10
  lightning run recipes/locft_bf.yaml --devices 8 --strategy ddp --precision bf16-mixed --data.path edits.jsonl
  lightning run my_recipe.yaml --config callbacks/kl_locality.yaml      with a callback fragment added
  lightning run recipes/trl_sft.py --devices 2 --output_dir runs/mine   a script

options, before or after the recipe:
  --devices N|0,1|auto   processes on this machine, one per device (default: 1)
  --strategy NAME        ddp, fsdp, deepspeed, ... (default: the trainer chooses)
  --precision NAME       32-true, bf16-mixed, bf16-true, 16-mixed, ...
  --accelerator NAME     cpu, gpu, cuda, mps, auto
  --num-nodes N  --node-rank I  --main-address HOST  --main-port PORT      for several machines

All other arguments go to the recipe or the script, and so do all arguments after --. The command
python -m kedit_train fit --help lists the keys of a recipe.

packaged recipes: {recipes}
"""
OPTIONS = (
    "--accelerator", "--strategy", "--devices", "--num-nodes", "--num_nodes", "--node-rank", "--node_rank",
    "--main-address", "--main_address", "--main-port", "--main_port", "--precision",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console script ``lightning``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with ending_interrupts():
        try:
            if given[:1] == ["run"]:
                raise SystemExit(run(given[1:]))
            if not given or given[0] in ("-h", "--help"):
                print(usage())
                raise SystemExit(0 if given else 2)
            hand_over(given[0])
        except EditError as error:
            print_error(str(error))
            raise SystemExit(2) from None


def run(arguments: Sequence[str]) -> int:
    """Run ``lightning run ...`` and return the exit code.

    Raises:
        EditError: the recipe or script does not exist, or an option is unknown or has no value.
    """
    options, target, rest = split(arguments)
    if target is None:
        print(usage())
        return 0 if rest in (["-h"], ["--help"]) else 2
    script, script_arguments = command(target, rest)
    launch, parsed = read_options([*options, "--", str(script), *script_arguments])
    processes = count_processes(launch, parsed)
    recipe = script_arguments != rest
    if recipe and processes * parsed.num_nodes == 1:
        return in_this_process(launch, parsed, script, script_arguments)
    # By default every process uses all cores. Two processes on one machine would then be slower than one process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, processes))))
    named_port = "--main-port" in options or "--main_port" in options
    return in_new_processes(launch, parsed, script_arguments, named_port=named_port)


def usage() -> str:
    """Return the help text, which lists the packaged recipes."""
    return HELP.format(recipes=", ".join(catalog.names("recipes")))


def split(arguments: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Split the words of a command into launcher options, the recipe or script, and the remaining words.

    Returns:
        The launcher options, the recipe or script (None if it is missing), and the remaining words. If the user asks
        for help and gives no recipe or script, the remaining words are ``["--help"]`` or ``["-h"]``.

    Raises:
        EditError: an option is unknown or has no value.
    """
    options: list[str] = []
    rest: list[str] = []
    target: str | None = None
    queue = list(arguments)
    if queue[:1] == ["model"]:  # The syntax of Lightning 2.5.0 and earlier is: lightning run model SCRIPT
        queue.pop(0)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            rest += queue
            break
        if name in OPTIONS:
            if not equals and not queue:
                raise EditError(f"{name} needs a value; see lightning run --help")
            options += [name, value if equals else queue.pop(0)]
        elif target is None and word in ("-h", "--help"):
            return options, None, [word]
        elif target is None and word.startswith("-"):
            raise EditError(
                f"unknown option {word}; use an option that lightning run --help lists. If {word} is an argument of "
                "the recipe, write it after the name of the recipe."
            )
        elif target is None:
            target = word
        else:
            rest.append(word)
    return options, target, rest


def command(target: str, rest: list[str]) -> tuple[Path, list[str]]:
    """Return the script to start, and its arguments. A recipe is started by the script ``edit.py``."""
    path = catalog.find("recipes", target)
    if path.suffix == ".py":
        return path, rest
    if path.suffix not in (".yaml", ".yml"):
        raise EditError(f"the file to run must be a recipe (.yaml) or a script (.py), got {target!r}.")
    return catalog.folder("recipes") / "edit.py", ["fit", "--config", str(path), *rest]


def read_options(words: list[str]) -> tuple[Any, Namespace]:
    """Parse the launcher options with the parser of Lightning Fabric."""
    import click
    from lightning.fabric import cli as launch

    fabric_run = cast(Any, launch)._main.commands["run"]
    try:
        options = fabric_run.make_context("lightning run", words).params
    except click.UsageError as error:
        raise EditError(f"{error.format_message()} See lightning run --help") from None
    options.pop("script_args")
    return launch, Namespace(**options)


def count_processes(launch: Any, parsed: Namespace) -> int:
    """Return the number of processes to start for the given devices and accelerator."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return launch._get_num_processes(parsed.accelerator, parsed.devices)
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise EditError(
            f"Lightning does not accept --devices {parsed.devices} with --accelerator {parsed.accelerator or 'auto'} "
            f"(its message: {error}); change one of the two options."
        ) from error


def in_this_process(launch: Any, parsed: Namespace, script: Path, arguments: list[str]) -> int:
    """Run a recipe in this process, which is faster than starting another process."""
    from kedit_train.cli.main import main as run_recipe

    launch._set_env_variables(parsed)
    sys.argv = [str(script), *arguments]
    run_recipe()
    return 0


def in_new_processes(launch: Any, parsed: Namespace, arguments: list[str], *, named_port: bool) -> int:
    """Start processes with Fabric's launcher (torchrun), and return the exit code.

    A process that fails prints its own error, so this function prints no error.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if parsed.num_nodes == 1 and not named_port:
        # With Fabric's fixed port, a second run on the same machine would fail or join the first run.
        parsed.main_port = free_port()
    try:
        launch.main(parsed, arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # Shells report a signal in this way.
    except SignalException as error:
        return 128 + error.sigval
    return 0


def free_port() -> int:
    """Return the number of a free port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hand_over(verb: str) -> None:
    """Pass a verb other than ``run`` to lightning-sdk."""
    if find_spec("lightning_sdk") is None:
        raise EditError(
            f"lightning {verb} needs lightning-sdk; install lightning-sdk, or use lightning run (see lightning --help)."
        )
    from lightning_sdk.cli.entrypoint import main_cli  # pyright: ignore[reportMissingImports]

    main_cli()


if __name__ == "__main__":
    main()
