"""Moments and curvature factors against every token by itself, unpadded, with gradients by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from kedit_train.core import EditRun, Host
from kedit_train.core.drift.kfac import curvature_factors
from kedit_train.core.drift.linear_layers import linear_maps
from kedit_train.core.drift.second_moments import input_moments, own_batches, text_batches
from kedit_train.errors import EditError

ROWS = [[5, 7, 11, 13, 17, 3], [2, 4], [60], [9, 8, 7, 6]]
SCOPES = {"llama": ["mlp.down_proj", "mlp.up_proj", "q_proj"], "gpt2": ["mlp.c_proj", "mlp.c_fc", "attn.c_attn"]}


def a_run(model: nn.Module, endings: list[str]) -> EditRun:
    run = EditRun(model, Host(object()))
    run.set_scope({n: p for n, p in model.named_parameters() if any(n.endswith(f"{e}.weight") for e in endings)})
    assert run.scope
    return run


def by_hand(model: nn.Module, run: EditRun, name: str) -> list[torch.Tensor]:
    """Inputs [S, d] of the module for each row, one row at a time."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    return seen


@pytest.mark.parametrize("family", SCOPES)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_moments_are_those_of_every_real_token(tiny, family, batch_size):
    model = tiny(family).eval()
    run = a_run(model, SCOPES[family])
    maps = linear_maps(model, run.scope)
    model.train()
    found = input_moments(run, maps, model, text_batches(ROWS, batch_size, torch.device("cpu")))
    assert model.training
    model.eval()
    for name, moment in found.items():
        keys = torch.cat(by_hand(model, run, name))
        assert maps[name].inputs_first == (family == "gpt2")
        assert moment.count == len(keys) == 13
        torch.testing.assert_close(moment.mean.double(), keys.T @ keys / 13, rtol=1e-4, atol=1e-5)


def test_moments_are_the_unedited_models_in_fp32_and_leave_no_trace(tiny):
    model = tiny("llama").eval().bfloat16()
    run = a_run(model, ["mlp.down_proj", "mlp.up_proj"])
    maps = linear_maps(model, run.scope)
    before = input_moments(run, maps, model, text_batches(ROWS, 2, torch.device("cpu")))
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        for parameter in run.scope.values():
            parameter.add_(1.0)
    again = input_moments(run, maps, model, text_batches(ROWS, 2, torch.device("cpu")))
    for name in maps:
        assert before[name].sum.dtype is torch.float32
        assert torch.equal(before[name].sum, again[name].sum)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_the_output_heads_own_inputs_are_all_of_them(tiny):
    model = tiny("llama").eval()
    run = a_run(model, ["lm_head"])
    maps = linear_maps(model, run.scope)
    (moment,) = input_moments(run, maps, model, text_batches(ROWS, 2, torch.device("cpu"))).values()
    keys = torch.cat(by_hand(model, run, "lm_head.weight"))
    assert moment.count == 13
    torch.testing.assert_close(moment.mean.double(), keys.T @ keys / 13, rtol=1e-4, atol=1e-5)


def test_a_module_without_texts_gives_moments_of_its_own_batches():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    run = a_run(model, ["0", "2"])
    series = [torch.randn(3, 4), (torch.randn(2, 4),), {"input": torch.randn(5, 4)}]
    maps = linear_maps(model, run.scope)
    found = input_moments(run, maps, model, own_batches(series, torch.device("cpu")))
    rows = torch.cat([series[0], series[1][0], series[2]["input"]])
    torch.testing.assert_close(found["0.weight"].mean, rows.T @ rows / 10)
    hidden = torch.tanh(model[0](rows)).detach()
    torch.testing.assert_close(found["2.weight"].mean, hidden.T @ hidden / 10)


class Flattening(nn.Module):
    """Reads [B, S] and multiplies every second position only."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.unused = nn.Embedding(61, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.linear(self.embedding(input_ids)[:, ::2])


def test_what_cannot_be_counted_is_refused():
    model = Flattening()
    run = a_run(model, ["linear"])
    maps = linear_maps(model, run.scope)
    with pytest.raises(EditError, match=r"linear\.weight reads \(4, 3, 4\), .* set batch_size=1"):
        input_moments(run, maps, model, text_batches(ROWS, 4, torch.device("cpu")))
    (moment,) = input_moments(run, maps, model, text_batches(ROWS, 1, torch.device("cpu"))).values()
    assert moment.count == 3 + 1 + 1 + 2
    run.set_scope({"unused.weight": model.unused.weight})
    maps = linear_maps(model, run.scope)
    with pytest.raises(EditError, match=r"unused\.weight was never called on the texts"):
        input_moments(run, maps, model, text_batches(ROWS, 1, torch.device("cpu")))


def test_only_weights_of_linear_maps_are_found(tiny):
    model = tiny("gpt2")
    with pytest.raises(EditError, match=r"Conv1D \(transformer\.wte\.weight, .* and \d+ more\).*\.weight'\)"):
        linear_maps(model, dict(model.named_parameters()))
    shared = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3), Conv1D(5, 3)])
    shared[1].weight = shared[0].weight
    found = linear_maps(shared, {"0.weight": shared[0].weight, "3.weight": shared[3].weight})
    assert found["0.weight"].modules == (shared[0], shared[1])
    assert found["3.weight"].as_matrix(shared[3].weight).shape == (5, 3)
    shared[2].weight = shared[0].weight
    with pytest.raises(EditError, match=r"\(0\.weight\)"):
        linear_maps(shared, {"0.weight": shared[0].weight})
    with pytest.raises(EditError, match=r"\(0\.bias\)"):
        linear_maps(shared, {"0.bias": shared[0].bias})


def test_sharded_weights_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 2, bias=False)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(EditError, match=r"weight is sharded over processes \(DTensor\), .* train with DDP"):
            linear_maps(model, {"weight": model.weight})
    finally:
        dist.destroy_process_group()


def factors_by_hand(model: Any, run: EditRun, name: str, labels: dict[tuple[int, ...], list[int]]):
    """E[a aT] and E[g gT] of every token, each row by itself, for these labels."""
    module = model.get_submodule(name.removesuffix(".weight"))
    inputs, gradients = [], []
    for row in ROWS:
        kept: dict[str, Any] = {}
        handle = module.register_forward_hook(lambda _, args, out, kept=kept: kept.update(a=args[0][0], y=out))
        logits = model(input_ids=torch.tensor([row])).logits[0]
        handle.remove()
        loss = F.cross_entropy(logits, torch.tensor(labels[tuple(row)]), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept["y"])
        inputs.append(kept["a"].detach().double())
        gradients.append(gradient[0].double())
    a, g = torch.cat(inputs), torch.cat(gradients)
    return a.T @ a / len(a), g.T @ g / len(g)


@pytest.mark.parametrize("family", SCOPES)
def test_factors_are_those_of_labels_drawn_from_the_model_whatever_the_batches(tiny, family):
    model = tiny(family).eval()
    run = a_run(model, SCOPES[family])
    maps = linear_maps(model, run.scope)
    generator, labels = torch.Generator().manual_seed(3), {}
    for row in ROWS:
        numbers = torch.rand(len(row), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            cumulative = model(input_ids=torch.tensor([row])).logits[0].double().softmax(-1).cumsum(-1)
        labels[tuple(row)] = [int((c <= u).sum()) for c, u in zip(cumulative, numbers, strict=True)]
    for batch_size in (1, 3):
        inputs, gradients = curvature_factors(run, maps, ROWS, batch_size=batch_size, seed=3)
        for name, one in maps.items():
            a, s = factors_by_hand(model, run, name, labels)
            assert inputs[name].count == gradients[name].count == 13
            torch.testing.assert_close(inputs[name].mean.double(), a, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(gradients[name].mean.double(), s, rtol=1e-3, atol=1e-6)
            assert (len(s), len(a)) == one.as_matrix(run.scope[name]).shape
    assert all(p.grad is None for p in model.parameters())


def test_labels_are_drawn_with_the_models_probabilities(tiny):
    """The gradient at the head's input, averaged over draws, vanishes: E[onehot - p] = 0."""
    model = tiny("llama", num_hidden_layers=1).eval()
    run = a_run(model, ["mlp.down_proj"])
    maps = linear_maps(model, run.scope)
    seen = [
        float(curvature_factors(run, maps, ROWS * 8, batch_size=32, seed=s)[1].popitem()[1].mean.trace())
        for s in (0, 1)
    ]
    assert seen[0] != seen[1]
    # In expectation the trace is the Gauss-Newton one: sum over tokens and labels of p |g_label|^2, computed in full.
    (name,) = maps
    module, total, count = model.get_submodule(name.removesuffix(".weight")), 0.0, 0
    for row in ROWS:
        kept: dict[str, Any] = {}
        handle = module.register_forward_hook(lambda _, args, out, kept=kept: kept.update(y=out))
        logits = model(input_ids=torch.tensor([row])).logits[0]
        handle.remove()
        # Only the token's own loss reaches it: behind the last layer's MLP positions do not mix.
        for t in range(len(row)):
            p = logits[t].softmax(-1).detach()
            for label in range(61):
                loss = F.cross_entropy(logits[t], torch.tensor(label))
                (g,) = torch.autograd.grad(loss, kept["y"], retain_graph=True)
                total += float(p[label] * g[0, t].square().sum())
            count += 1
    assert sum(seen) / 2 == pytest.approx(total / count, rel=0.25)


def test_the_output_head_is_refused(tiny):
    model = tiny("llama")
    run = a_run(model, ["lm_head"])
    maps = linear_maps(model, run.scope)
    with pytest.raises(EditError, match="vocabulary by vocabulary"):
        curvature_factors(run, maps, ROWS, batch_size=2, seed=0)
