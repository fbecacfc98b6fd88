"""jsonargparse explains a wrong key over ten lines, with every type that it tried; a user needs the key."""

from __future__ import annotations

import inspect
import re
from importlib import import_module

# Lines that only tell what else was tried, or repeat the value.
NOISE = re.compile(
    r"Does not validate against any of the Union|Subtypes:|Errors:|Expected a <class 'NoneType'>|Not a valid subclass"
    r"|Subclass types expect|a class path \(str\)|a dict with|Given value type:|Given value: NestedArg"
)
# What jsonargparse tries where no class is named; nobody has asked for it.
BASE = "Problem with given class_path 'lightning.Callback':"
# jsonargparse's word for a key that came as --trainer.callbacks.KEY.
ON_THE_LAST = re.compile(r"trainer\.callbacks.*NestedArg\(key=", re.DOTALL)


def shorten(message: str) -> str:
    """One line: the key, the class it belongs to, what is wrong with it, what there is instead."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = _without_base(lines)
    kept = list(dict.fromkeys(line for line in lines if line and not NOISE.match(line)))
    inner = [i for i, line in enumerate(kept) if line.startswith("Problem with given class_path")]
    if inner:
        # What follows a class's own complaint is about the alternatives.
        kept = [line for line in kept[: inner[-1] + 3] if not line.startswith("Given value:")]
    text = re.sub(r":; ", ": ", "; ".join(kept))
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "").replace("Expected a ", "expected ")
    # LightningCLI does not know of sft.
    text = re.sub(r"(\(choose from |\{)'?fit'?([)}])", r"\1fit, sft\2", text)
    refused = re.search(r"(\w+(?:\.\w+)+): Option '\w+' is not accepted", text)
    accepted = f"; it takes {', '.join(arguments(refused[1]))}" if refused else "; every key is listed by fit --help"
    if refused and ON_THE_LAST.search(message):
        if refused[1] == "lightning.Callback":
            return "trainer.callbacks: the run lists no callback that could take the key: give --config RECIPE.yaml"
        accepted += (
            "; --trainer.callbacks.KEY is the last callback's of the list: to set another one's, kedit cp the recipe"
        )
    return text.rstrip(".") + accepted


def _without_base(lines: list[str]) -> list[str]:
    """Leave out that a bare ``Callback`` was tried too, where another class has been named."""
    if not any(line.startswith("Problem with given class_path") and line != BASE for line in lines):
        return lines
    return [line for i, line in enumerate(lines) if line != BASE and (i == 0 or lines[i - 1] != BASE)]


def arguments(class_path: str) -> list[str]:
    """The names that a class takes in ``init_args``."""
    module, _, name = class_path.rpartition(".")
    return [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "kwargs"]
