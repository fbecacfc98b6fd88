"""``lightning run``: start a recipe or a script on one or several processes, through Fabric's launcher.

Lightning 2.5.1 and later come without a ``lightning`` command; its launcher is ``lightning.fabric.cli``, used here
unchanged. Everything but ``run`` belongs to the cloud client ``lightning-sdk`` and is handed to it where installed.
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
from kedit_train.cli.console import say_error
from kedit_train.errors import EditError

HELP = """\
lightning run [OPTIONS] RECIPE.yaml|SCRIPT.py [ARGUMENTS ...]

Starts a recipe (a LightningCLI configuration) or a script on one or several processes.

  lightning run recipes/quickstart.yaml
  lightning run quickstart --devices 2                      the same by its name, on two processes
  lightning run overtone --model.name Qwen/Qwen3-0.6B --data.path edits.jsonl --trainer.max_epochs 10
  lightning run recipes/locft_bf.yaml --devices 8 --strategy ddp --precision bf16-mixed --data.path edits.jsonl
  lightning run my_recipe.yaml --config callbacks/kl_locality.yaml      a fragment on top
  lightning run recipes/trl_sft.py --devices 2 --output_dir runs/mine   a script, as `fabric run` starts it

Options, before or after the recipe:
  --devices N|0,1|auto   processes on this machine, one for each device (1)
  --strategy NAME        ddp, fsdp, deepspeed, ... (chosen by the trainer)
  --precision NAME       32-true, bf16-mixed, bf16-true, 16-mixed, ...
  --accelerator NAME     cpu, gpu, cuda, mps, auto
  --num-nodes N  --node-rank I  --main-address HOST  --main-port PORT      several machines

Everything else goes to the recipe's run (`python -m kedit_train fit --help` lists the keys) or to the script;
what follows `--` goes there whatever it is. Recipes by name: {recipes}
"""
OPTIONS = (
    "--accelerator", "--strategy", "--devices", "--num-nodes", "--num_nodes", "--node-rank", "--node_rank",
    "--main-address", "--main_address", "--main-port", "--main_port", "--precision",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script ``lightning``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["run"]:
            raise SystemExit(run(given[1:]))
        if not given or given[0] in ("-h", "--help"):
            print(usage())
            raise SystemExit(0 if given else 2)
        hand_over(given[0])
    except EditError as error:
        say_error(str(error))
        raise SystemExit(2) from None


def run(arguments: Sequence[str]) -> int:
    """``lightning run ...``; gives the exit code.

    Raises:
        EditError: no such recipe or script, or an option without its value.
    """
    options, target, rest = split(arguments)
    if target is None:
        print(usage())
        return 0 if rest else 2
    script, script_arguments = command(target, rest)
    launch, parsed = read_options([*options, "--", str(script), *script_arguments])
    processes = count_processes(launch, parsed)
    recipe = script_arguments != rest
    if recipe and processes * parsed.num_nodes == 1:
        return in_this_process(launch, parsed, script, script_arguments)
    # Fabric gives every process all cores; two on one machine then take several times as long as one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, processes))))
    named_port = "--main-port" in options or "--main_port" in options
    return in_new_processes(launch, parsed, script_arguments, named_port=named_port)


def usage() -> str:
    return HELP.format(recipes=", ".join(catalog.names("recipes")))


def split(arguments: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Tell the launcher's options, the recipe or script, and what goes to it apart.

    Without a recipe or script, what is left tells whether help was asked for.
    """
    options: list[str] = []
    rest: list[str] = []
    target: str | None = None
    queue = list(arguments)
    if queue[:1] == ["model"]:  # Lightning 2.5.0 and earlier: lightning run model SCRIPT
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
            raise EditError(f"{word} is no option of lightning run, and arguments come after the recipe; see --help")
        elif target is None:
            target = word
        else:
            rest.append(word)
    return options, target, rest


def command(target: str, rest: list[str]) -> tuple[Path, list[str]]:
    """The script to start and its arguments: a recipe starts the entry that all recipes share."""
    path = catalog.find("recipes", target)
    if path.suffix == ".py":
        return path, rest
    if path.suffix not in (".yaml", ".yml"):
        raise EditError(f"{target!r} is neither a recipe (.yaml) nor a script (.py)")
    return catalog.folder("recipes") / "edit.py", ["fit", "--config", str(path), *rest]


def read_options(words: list[str]) -> tuple[Any, Namespace]:
    """Let Fabric's own command read its options."""
    import click
    from lightning.fabric import cli as launch

    fabric_run = cast(Any, launch)._main.commands["run"]
    try:
        found = fabric_run.make_context("lightning run", words).params
    except click.UsageError as error:
        raise EditError(f"{error.format_message()} See lightning run --help") from None
    found.pop("script_args")
    return launch, Namespace(**found)


def count_processes(launch: Any, parsed: Namespace) -> int:
    """How many processes these devices make."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return launch._get_num_processes(parsed.accelerator, parsed.devices)
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise EditError(f"--devices {parsed.devices} --accelerator {parsed.accelerator}: {error}") from error


def in_this_process(launch: Any, parsed: Namespace, script: Path, arguments: list[str]) -> int:
    """One process needs no second one to watch it, which would import everything twice."""
    from kedit_train.cli import edit

    launch._set_env_variables(parsed)
    sys.argv = [str(script), *arguments]
    edit.main()
    return 0


def in_new_processes(launch: Any, parsed: Namespace, arguments: list[str], *, named_port: bool) -> int:
    """Fabric's launcher, which is torchrun; a process that fails has said why, so its exit code is enough."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if parsed.num_nodes == 1 and not named_port:
        # Fabric's fixed port would let a second run on the same machine fail, or join the first.
        parsed.main_port = free_port()
    try:
        launch.main(parsed, arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a signal, as shells count them
    except SignalException as error:
        return 128 + error.sigval
    return 0


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hand_over(verb: str) -> None:
    """Everything but ``run`` is lightning-sdk's."""
    if find_spec("lightning_sdk") is None:
        raise EditError(
            f"lightning {verb}: this command has one verb, run (see lightning --help); install lightning-sdk for others"
        )
    from lightning_sdk.cli.entrypoint import main_cli  # pyright: ignore[reportMissingImports]

    main_cli()


if __name__ == "__main__":
    main()
