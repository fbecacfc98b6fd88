"""LightningCallback: a base class that becomes a ``lightning.pytorch.Callback`` when Lightning is imported.

Importing Lightning takes time and memory, and a run with transformers or TRL does not need Lightning. Therefore this
module does not import it. If Lightning is already imported, ``LightningCallback`` inherits from
``lightning.pytorch.Callback`` at once. Otherwise, an import hook adds this base class at the end of the first
``import lightning.pytorch``, before the user can create a trainer. So Lightning can be imported before or after
kedit-train.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

LIGHTNING = "lightning.pytorch"

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    class LightningCallback(Callback):
        """A ``lightning.pytorch.Callback``."""

else:

    class _Placeholder:
        """The base class of ``LightningCallback`` until Lightning is imported.

        Python cannot replace the base class ``object``, so ``LightningCallback`` needs another base class.
        """

    class LightningCallback(_Placeholder):
        """A ``lightning.pytorch.Callback`` if Lightning is imported, otherwise a class without methods."""


class _AfterLightning(MetaPathFinder):
    """An import hook that completes ``LightningCallback`` when Python has executed ``lightning.pytorch``."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find ``lightning.pytorch`` with the other import finders, and run ``_complete`` at the end of its import."""
        if name != LIGHTNING:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _complete(module)

            loader.exec_module = exec_module
        return spec


def _complete(lightning: Any) -> None:
    """Make ``LightningCallback``, all its subclasses and all their instances Lightning callbacks."""
    LightningCallback.__bases__ = (lightning.Callback,)


if LIGHTNING in sys.modules:
    _complete(sys.modules[LIGHTNING])
else:
    sys.meta_path.insert(0, _AfterLightning())
