"""One run on several processes: the trainer follows the launcher, or the run does not start.

A trainer that does not know that a launcher started it with others trains alone on every process, without a word
(seen with ``fabric run --devices 2`` and ``lightning.pytorch.Trainer``).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, MutableMapping
from typing import Any

from kedit_train.errors import EditError

# Trainer argument -> the environment variable that Fabric's launcher sets for it, and the value that says nothing.
FOLLOWED = {
    "accelerator": ("LT_ACCELERATOR", "auto"),
    "strategy": ("LT_STRATEGY", "auto"),
    "precision": ("LT_PRECISION", None),
}


def world_size(environment: Mapping[str, str]) -> int | None:
    """Processes that the launcher started; None where there was no launcher."""
    if environment.get("WORLD_SIZE"):
        return int(environment["WORLD_SIZE"])
    return 1 if environment.get("LT_CLI_USED") else None


def follow_launcher(trainer: MutableMapping[str, Any], environment: Mapping[str, str]) -> None:
    """Give trainer arguments that say nothing the launcher's values.

    Args:
        trainer: arguments of ``lightning.pytorch.Trainer``; changed in place.
        environment: ``os.environ``.

    Raises:
        EditError: an argument says something else than the launcher.
    """
    world = world_size(environment)
    if world is None:
        return
    for key, (variable, silent) in FOLLOWED.items():
        wanted = environment.get(variable)
        if wanted is None or str(trainer[key]) == wanted:
            continue
        if trainer[key] != silent:
            raise EditError(
                f"trainer.{key} is {trainer[key]!r} in the configuration and the launcher was told --{key} {wanted}: "
                "say it once"
            )
        trainer[key] = wanted
    local = int(environment.get("LOCAL_WORLD_SIZE") or world)
    if trainer["devices"] == "auto":
        chosen = environment.get("LT_DEVICES", "")
        # "0,3" names devices; a number only counts them.
        trainer["devices"] = chosen if "," in chosen else local
    if trainer["num_nodes"] == 1:
        trainer["num_nodes"] = world // local
    count = _count(trainer["devices"])
    if count is not None and count * trainer["num_nodes"] != world:
        raise _mismatch(count * trainer["num_nodes"], world)


def check_world(size: int, environment: Mapping[str, str]) -> None:
    """Compare ``trainer.world_size``, what the trainer made of it all, with the number of processes that run.

    Raises:
        EditError: they differ, so that several trainings would run beside each other.
    """
    world = world_size(environment)
    if world is not None and size != world:
        raise _mismatch(size, world)


def part() -> None:
    """End a distributed run in step: gloo aborts some processes that end while others still talk to them."""
    import torch.distributed as dist

    from kedit_train.core.processes import has_process_group

    if has_process_group():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def _count(devices: Any) -> int | None:
    """How many devices are asked for; None where the machine decides (-1)."""
    if isinstance(devices, str):
        parts = [part for part in devices.strip("[] ").split(",") if part.strip()]
        devices = int(devices) if len(parts) == 1 and "," not in devices else parts
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return len(devices)


def _mismatch(size: int, world: int) -> EditError:
    return EditError(
        f"the trainer is set to {size} process(es) and the launcher started {world}: leave out trainer.devices and "
        f"trainer.num_nodes, and say --devices {size} to the launcher for that many"
    )
