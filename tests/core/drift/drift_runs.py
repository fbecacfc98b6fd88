"""A run over a bare model, and the token sequences that the tests of drift statistics share."""

from __future__ import annotations

from torch import nn

from kedit_train.core import EditRun, Host

SEQUENCES = [[5, 7, 11, 13, 17, 3], [2, 4], [60], [9, 8, 7, 6]]
SCOPES = {"llama": ["mlp.down_proj", "mlp.up_proj", "q_proj"], "gpt2": ["mlp.c_proj", "mlp.c_fc", "attn.c_attn"]}


def run_on(model: nn.Module, modules: list[str]) -> EditRun:
    """Open a run whose scope is the weights of the modules with these name endings."""
    run = EditRun(model, Host(object()))
    run.set_scope({n: p for n, p in model.named_parameters() if any(n.endswith(f"{m}.weight") for m in modules)})
    assert run.scope
    return run
