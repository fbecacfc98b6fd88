"""Shorten the errors of jsonargparse to one line that names the wrong key.

The original error of jsonargparse lists every type that the parser tried.
"""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from typing import Any

from kedit_train.arguments import cut

# Lines that only list other types that jsonargparse tried, or repeat the given value.
NOISE = re.compile(
    r"Does not validate against any of the Union|Subtypes:|Errors:|Expected a <class 'NoneType'>|Not a valid subclass"
    r"|Subclass types expect|a class path \(str\)|a dict with|Given value type:"
    # The value is the whole list of callbacks, although only one of the callbacks is wrong.
    r"|Given value: \[?(?:NestedArg|Namespace\(|\{'class_path')"
)
# An error of Python about a wrong value of class_path or init_args -> what the error means.
PYTHON = {
    r"unhashable type: '\w+'": "class_path must be the path of a class, such as kedit_train.callbacks.TokenLoss",
    r"'\w+' object has no attribute 'keys'": "init_args must be a mapping of arguments to values",
}
# The error about Lightning's base class, which jsonargparse tries as well as the class that the user named.
BASE = "Problem with given class_path 'lightning.Callback':"
HELP = "python -m kedit_train fit --help"
# How jsonargparse prints a key that was given as --trainer.callbacks.KEY.
ON_THE_LAST = re.compile(r"trainer\.callbacks.*NestedArg\(key=", re.DOTALL)


def shorten(message: str) -> str:
    """Shorten an error of jsonargparse to one line.

    The line names the wrong key, the class that the key belongs to, the problem, and the valid keys.
    """
    # Lines are cut, because the patterns below take quadratic time, and because a long line would fill the terminal.
    lines = [cut(line.strip().removeprefix("- "), 300) for line in message.splitlines()]
    lines = _without_base(lines)
    kept = list(dict.fromkeys(line for line in lines if line and not NOISE.match(line)))
    inner = [i for i, line in enumerate(kept) if line.startswith("Problem with given class_path")]
    if inner:
        # The lines after the error of the last class are about other types.
        kept = [line for line in kept[: inner[-1] + 3] if not line.startswith("Given value:")]
    text = re.sub(r":; ", ": ", "; ".join(kept))
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "").replace("Expected a ", "expected ")
    text = _clearer(text)
    for pattern, meaning in PYTHON.items():
        text = re.sub(pattern, meaning, text)
    # The message of LightningCLI does not list the command sft, so it is added.
    text = re.sub(r"(\(choose from |\{)'?fit'?([)}])", r"\1fit, sft\2", text)
    refused = re.search(r"(\w+(?:\.\w+)+): Option '\w+' is not accepted", text)
    names = arguments(refused[1]) if refused else []
    accepted = f"; valid arguments: {', '.join(names)}" if names else f"; {HELP} lists every key"
    if refused and ON_THE_LAST.search(message):
        if refused[1] == "lightning.Callback":
            return "trainer.callbacks: the run lists no callbacks, so the key cannot be set; add --config RECIPE.yaml"
        accepted += (
            ". --trainer.callbacks.KEY changes the last callback in the list. To change another callback, write its "
            "class name: --trainer.callbacks.CLASS.KEY"
        )
    return cut(text.rstrip("."), 2000) + accepted


def _clearer(text: str) -> str:
    """Rewrite phrases such as "expected dot import path string", so that the message asks for the path of a class."""
    text = re.sub(r"expected path but [^;]* either not accessible or invalid; (?=.)", "", text)
    if text.startswith("trainer.callbacks:"):
        # One callback without a list is accepted too, so the error is not about a missing list.
        text = re.sub(r"expected list; (?!Given value|lightning\.Callback:)", "", text)
        text = text.replace("expected list", "expected a list of callbacks")
    text = re.sub(r"expected \w+(; expected \w+)+(?=[;,]|$)", lambda m: m[0].replace("; expected ", " or "), text)
    example = "kedit_train.callbacks.TokenLoss" if text.startswith("trainer.callbacks:") else "package.module.ClassName"
    text = re.sub(r"expected dot import path string: [^;]*", f"expected the path of a class, such as {example}", text)
    return text.replace("; Given value: ", ", got ").replace(". Got value: ", ", got ")


def wrong_callback(content: Any) -> str | None:
    """Return an error message for the first entry of ``trainer.callbacks`` that has no class path.

    The result is None if every entry has a class path. The message replaces the error of jsonargparse, which would only
    repeat the whole list.

    Args:
        content: the content of a configuration file.
    """
    if not isinstance(content, dict):
        return None
    trainer = content.get("trainer")
    lists = [content.get("trainer.callbacks"), content.get("trainer.callbacks+")]
    lists += [trainer.get("callbacks"), trainer.get("callbacks+")] if isinstance(trainer, dict) else []
    for entries in lists:
        for number, entry in enumerate(entries if isinstance(entries, list) else (), start=1):
            if not isinstance(entry, str) and not (isinstance(entry, dict) and "class_path" in entry):
                return (
                    f"entry {number} of trainer.callbacks must be a class with its arguments, got "
                    f"{cut(json.dumps(entry, default=str))}; write, for example, "
                    "'class_path: kedit_train.callbacks.NormBall' and, below it, 'init_args:' with the arguments, or "
                    "remove the entry"
                )
    return wrong_callback(content.get("fit"))


def _without_base(lines: list[str]) -> list[str]:
    """Remove the lines about Lightning's base class if jsonargparse also reports the user's class."""
    if not any(line.startswith("Problem with given class_path") and line != BASE for line in lines):
        return lines
    return [line for i, line in enumerate(lines) if line != BASE and (i == 0 or lines[i - 1] != BASE)]


def arguments(class_path: str) -> list[str]:
    """Return the names of the arguments that a class accepts in ``init_args``, or [] if the class does not exist."""
    module, _, name = class_path.rpartition(".")
    try:
        return [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "kwargs"]
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
