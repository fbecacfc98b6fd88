"""The divergence of the routers equals the one that is computed from the router logits of transformers."""

from __future__ import annotations

import pytest
import torch
from installed import needs
from moe_models import FAMILIES, build

from kedit_train import world
from kedit_train.callbacks import EditMetrics, ParameterScope, editing
from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.evaluation.options import EvaluationOptions
from kedit_train.evaluation.scoring import router_divergence
from kedit_train.evaluation.scoring.router_divergence import RouterDivergence

# transformers 4 has other names for experts, and another kind of router.
pytestmark = needs("transformers", "5.0")


@pytest.fixture(scope="module")
def tokenizer():
    return world.load()[1]


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=3))


def probabilities(model, tokenizer, prompt: str) -> torch.Tensor:
    """Return the router distributions [layers, tokens, experts] that transformers reports for one prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    return torch.stack([layer.reshape(ids.shape[1], -1) for layer in logits]).double().softmax(-1)


def expected(before, after, tokenizer, prompts: list[str]) -> tuple[float, int]:
    divergences = []
    for prompt in prompts:
        p, q = probabilities(before, tokenizer, prompt), probabilities(after, tokenizer, prompt)
        divergences.append((p * (p / q).log()).sum(-1).flatten())
    values = torch.cat(divergences)
    return float(values.mean()), len(values)


def change(model, amount: float = 0.2):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.mlp" in name or "layers.1.feed_forward" in name:
                parameter.add_(torch.randn_like(parameter) * amount)
    return model


def locality_prompts(edits) -> list[str]:
    return list(dict.fromkeys(p.prompt for edit in edits for probes in edit.locality.values() for p in probes))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_formula_on_the_router_logits_of_transformers(family, tokenizer, edits):
    edits = edits[:1]
    model, before = build(family), build(family)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    divergence = RouterDivergence(model, tokenizer, edits, batch_size=2)
    assert divergence.measure(model).value == 0.0
    score = divergence.measure(change(model))
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    value, n = expected(before, model, tokenizer, locality_prompts(edits))
    assert value > 1e-3
    assert score.value == pytest.approx(value, rel=1e-4)
    assert score.n * divergence.layers == n


def test_without_locality_prompts_the_prompts_of_the_edits_are_used(tokenizer):
    edits = [Edit(prompt=f"{who} lives in", target="Rome") for who in ("Anna", "The old king of the hill")]
    model = build("mixtral")
    divergence = RouterDivergence(model, tokenizer, edits)
    assert divergence.measure(change(model)).value == pytest.approx(
        expected(build("mixtral"), model, tokenizer, [edit.prompt for edit in edits])[0], rel=1e-4
    )


def test_the_prompts_are_limited_and_spread_over_the_edits(monkeypatch):
    monkeypatch.setattr(router_divergence, "MAX_PROMPTS", 2)
    edits = [Edit(prompt="a", target="b", locality={"near": [Probe(prompt=f"{i}", answers=["c"])]}) for i in range(5)]
    assert router_divergence._choose_prompts(edits) == ["0", "3"]
    assert router_divergence._choose_prompts(edits[:2]) == ["0", "1"]


@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "mixtral"])
def test_edit_metrics_log_it_at_every_evaluation(family, tokenizer, edits, monkeypatch):
    model, edit = build(family), edits[0]
    metrics = EditMetrics([edit], every_n_steps=1, show=False, evaluation=EvaluationOptions(max_new_tokens=2))
    rows, ids = [], torch.tensor([tokenizer(f"{edit.prompt} {edit.target}")["input_ids"]])
    with editing(model, [ParameterScope(1, modules="mlp.down_proj"), metrics], tokenizer=tokenizer) as run:
        monkeypatch.setattr(run.run.host, "log", lambda row, **options: rows.append(dict(row)))
        optimizer = torch.optim.SGD(run.parameters(), lr=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            run.before_step()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    logged = [row["edit/router/kl"] for row in rows if "edit/router/kl" in row]
    assert len(logged) == 3
    assert 0.0 < logged[0] < logged[1] == logged[2]
    value, _ = expected(build(family), model, tokenizer, locality_prompts([edit]))
    assert metrics.report.metrics["router"]["kl"].value == pytest.approx(value, rel=1e-3)
    assert "edit/router/kl" not in metrics.unedited.flat()
    assert "routers: KL (nats per token)" in metrics.report.markdown()


def test_a_dense_model_has_no_routers(tokenizer, edits):
    assert RouterDivergence(world.load()[0], tokenizer, edits).layers == 0
