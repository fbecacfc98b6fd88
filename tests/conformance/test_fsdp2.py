"""FSDP2 on two gloo processes: constraints hold exactly, and the weights are those of one process up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import shards
from installed import needs
from safetensors.torch import load_file

from kedit_train import world

pytestmark = needs("torch", "2.13")  # FSDP2 of torch 2.6 does not run on CPUs

TESTS = Path(__file__).resolve().parents[1]
# fully_shard on each layer after the edit has begun, and on the whole model only before the edit begins.
STYLES = ["layers", pytest.param("root", marks=pytest.mark.slow)]
SCOPE = {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    selected = [i.callspec.params.get("style", "layers") for i in request.session.items if hasattr(i, "callspec")]
    (folder / "styles.json").write_text(json.dumps([s for s in ("layers", "root") if s in selected]))
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "conformance.shards", str(folder)]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (folder / "refused-1.json").exists(), done.stderr[-3000:]
    shards.main(folder)
    return folder


def base() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in world.load()[0].named_parameters()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", shards.CASES)
def test_sharded_training_ends_with_the_weights_of_one_process(case: str, style: str, folder: Path) -> None:
    alone = load_file(folder / f"{case}-one-0.safetensors")
    first, second = (load_file(folder / f"{case}-{style}-{rank}.safetensors") for rank in range(2))
    before, moved = base(), 0
    for name in before:
        assert torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)), name
        if case != "everything" and name not in SCOPE:
            assert torch.equal(first[name].view(torch.int32), before[name].view(torch.int32)), name
            continue
        moved += int((first[name] != before[name]).sum())
        assert (first[name] - alone[name]).norm() < 1e-3 * (alone[name] - before[name]).norm(), name
    assert moved
    rows, own = (json.loads((folder / f"{case}-{which}-0.json").read_text()) for which in (style, "one"))
    for row, expected in zip(rows, own, strict=True):
        # Token counts are those of this process; all other metrics are global.
        assert {k: v for k, v in row.items() if "tokens" not in k} == pytest.approx(
            {k: v for k, v in expected.items() if "tokens" not in k}, rel=2e-2, abs=1e-6
        )


@pytest.mark.parametrize("style", STYLES)
def test_scope_mask_and_balls_are_exact_on_the_gathered_weights(style: str, folder: Path) -> None:
    after, before = load_file(folder / f"exact-{style}-0.safetensors"), base()
    for name in SCOPE:
        held = before[name].abs().flatten().argsort()[: before[name].numel() // 2]
        kept, start = (w[name].flatten()[held].view(torch.int32) for w in (after, before))
        assert torch.equal(kept, start)
        assert int((after[name] != before[name]).sum()) > 0.9 * len(held)
        assert float((after[name].double() - before[name].double()).abs().max()) <= 2e-3
    after = load_file(folder / f"l2-{style}-0.safetensors")
    total = sum(float((after[name].double() - before[name].double()).square().sum()) for name in SCOPE) ** 0.5
    assert 0.99 * 2e-2 < total <= 2e-2


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", ["kl", "everything"])
def test_the_kl_divergence_is_not_silently_zero(case: str, style: str, folder: Path) -> None:
    found = [row["edit/locality/kl"] for row in json.loads((folder / f"{case}-{style}-0.json").read_text())]
    assert abs(found[0]) < 1e-6
    assert min(found[1:]) > 1e-5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", ["exact", "everything"])
def test_reference_model_gives_the_model_before_the_edit_and_restores_it(case: str, style: str, folder: Path) -> None:
    answers = load_file(folder / f"{case}-{style}-0-answers.safetensors")
    model = world.load()[0]
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 11).unsqueeze(0)).logits
        model.load_state_dict(load_file(folder / f"{case}-{style}-0.safetensors"), strict=False)
        model.tie_weights()
        edited = model(input_ids=torch.arange(3, 11).unsqueeze(0)).logits
    assert (edited - expected).abs().max() > 1e-3
    torch.testing.assert_close(answers["before"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers["now"], edited, rtol=1e-5, atol=1e-5)
    assert torch.equal(answers["now"], answers["again"])


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("NullSpace", "is sharded over processes"),
        ("LowCurvature", "is sharded over processes"),
        ("SecondOrderLocality", "is sharded over processes"),
        ("PolyakStep", "is sharded over processes"),
        ("GradientMask", "gradients per example cannot be computed for sharded parameters"),
        ("WeightAnchor", "gradients per example cannot be computed for sharded parameters"),
        ("head again", "FSDP2 has already sharded them again by then"),
        ("head alone", "the output head is in scope and fully_shard was applied to it"),
        ("half precision, False", "full_precision=True cannot train half-precision parameters in fp32"),
        ("half precision, True", "full_precision=True cannot train half-precision parameters in fp32"),
        ("gradients", "no gradient has reached the sharded parameters in scope"),
    ],
)
def test_unsupported_combinations_are_errors_before_the_first_step(what: str, why: str, folder: Path) -> None:
    for rank in range(2):
        message = json.loads((folder / f"refused-{rank}.json").read_text())[what]
        assert message.startswith("after 0 steps: "), message
        assert why in message
