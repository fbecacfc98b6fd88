"""Copy the settings of the launcher to the arguments of the Lightning trainer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from kedit_train.errors import EditError
from kedit_train.processes import check_process_count, launched_processes

# Argument of the trainer -> the environment variable that Fabric's launcher sets, and the default of the argument.
FOLLOWED: dict[str, tuple[str, str | None]] = {
    "accelerator": ("LT_ACCELERATOR", "auto"),
    "strategy": ("LT_STRATEGY", "auto"),
    "precision": ("LT_PRECISION", None),
}


def follow_launcher(trainer: MutableMapping[str, Any], environment: Mapping[str, str]) -> None:
    """Copy the settings of the launcher to the trainer arguments that the user did not set.

    Args:
        trainer: arguments of ``lightning.pytorch.Trainer``; changed in place.
        environment: the environment variables of this process.

    Raises:
        EditError: the user and the launcher set a trainer argument to different values.
    """
    launched = launched_processes(environment)
    if launched is None:
        return
    for key, (variable, default) in FOLLOWED.items():
        value = environment.get(variable)
        if value is None or str(trainer[key]) == value:
            continue
        if trainer[key] != default:
            raise EditError(
                f"trainer.{key} is {trainer[key]!r} in the configuration, but the launcher was started with --{key} "
                f"{value}; remove {key} from the configuration or from the launcher command."
            )
        trainer[key] = value
    on_this_machine = int(environment.get("LOCAL_WORLD_SIZE") or launched)
    if trainer["devices"] == "auto":
        devices = environment.get("LT_DEVICES", "")
        # "0,3" names devices; a single number only counts them.
        trainer["devices"] = devices if "," in devices else on_this_machine
    if trainer["num_nodes"] == 1:
        trainer["num_nodes"] = launched // on_this_machine
    count = _count(trainer["devices"])
    if count is not None:
        check_process_count(count * trainer["num_nodes"], environment)


def _count(devices: Any) -> int | None:
    """Return the number of requested devices, or None for -1 (all devices of the machine)."""
    if isinstance(devices, str):
        parts = [part for part in devices.strip("[] ").split(",") if part.strip()]
        devices = int(devices) if len(parts) == 1 and "," not in devices else parts
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return len(devices)
