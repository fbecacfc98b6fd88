"""Edits, texts and a scope for the tests of ForgetFirst."""

from __future__ import annotations

from kedit_train import world
from kedit_train.callbacks import ParameterScope
from kedit_train.data import EditDataset

EDITS = EditDataset(world.edits(6))
TEXTS = world.locality_texts(exclude=EDITS, n=12)


def scope() -> ParameterScope:
    return ParameterScope(layers="4", modules="mlp.down_proj")
