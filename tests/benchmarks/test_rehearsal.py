"""The rehearsal of an edit of a large model: its formulas, a tiny run, and the tables of the page."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("rehearsal")


def llama_parameters(layers: int, h: int, f: int, kv: int, vocabulary: int) -> int:
    """Embeddings and head, and for each layer q and o, k and v, three matrices of the network, and two norms."""
    return 2 * vocabulary * h + h + layers * (2 * h * h + 2 * h * kv + 3 * h * f + 2 * h)


def test_the_models_on_the_meta_device_have_the_parameters_of_the_published_ones(rehearsal: Any) -> None:
    formulas = rehearsal.formulas
    sizes = {"Llama-3.1-8B": (32, 4096, 14_336, 1024), "Llama-3.1-70B": (80, 8192, 28_672, 1024)}
    for name, (layers, h, f, kv) in sizes.items():
        model = formulas.on_meta(formulas.MODELS[name]())
        scope = formulas.Scope.of(model, 0.7, "mlp.down_proj.weight")
        assert all(p.is_meta for p in model.parameters())
        assert scope.parameters == llama_parameters(layers, h, f, kv, 128_256)
        assert scope.shapes == [(h, f)]
        assert (scope.entries, scope.largest, scope.hidden) == (h * f, h * f, h)
    model = formulas.on_meta(formulas.MODELS["Qwen3-235B-A22B"]())
    scope = formulas.Scope.of(model, "0.5-0.8", "self_attn.o_proj.weight")
    attention = 4096 * (64 * 128 * 2 + 4 * 128 * 2) + 2 * 128
    layer = attention + 128 * 4096 + 128 * 3 * 4096 * 1536 + 2 * 4096
    assert scope.parameters == 2 * 151_936 * 4096 + 4096 + 94 * layer
    # Layers 47 to 75 of 94.
    assert scope.shapes == [(4096, 8192)] * 29


def test_the_formulas(rehearsal: Any) -> None:
    formulas = rehearsal.formulas
    scope = formulas.Scope([(3, 10), (4, 10)], hidden=5, parameters=1000)
    s, m, d = 70, 40, 10
    assert formulas.weights(scope) == 2000
    assert formulas.scope_bytes(scope) == 8 * s
    assert formulas.step_bytes(scope) == max(22 * s + 2 * m, 20 * s + 8 * m)
    assert formulas.null_space_step_bytes(scope) == max(22 * s + 2 * m, 20 * s + 8 * m, 24 * s + 8 * m)
    assert formulas.statistics_bytes(scope, 6) == 2 * 4 * d**2 + 36 * d**2
    assert formulas.statistics_bytes(scope, 5) == 2 * 4 * d**2 + 12 * d**2 + 40 * d * 13
    assert formulas.directions_bytes(scope, 8) == 2 * 4 * d * 2
    assert formulas.hidden_state_bytes(scope, 7) == 2 * 5 * 7
    assert formulas.delta_bytes(scope) == 4 * s


def test_a_tiny_model_is_measured(rehearsal: Any, tmp_path: Path) -> None:
    config = rehearsal.formulas.llama(3, 64, 160, 2, vocab_size=500, num_key_value_heads=1)
    rehearsal.make(tmp_path / "model", config)
    found: dict[str, Any] = {}
    for part in rehearsal.PARTS:
        row = rehearsal.measure(part, tmp_path / "model", "0.7", 2)
        assert (row["depth"], row["matrices"], list(row["shape"])) == (3, 1, [64, 160])
        found |= row["found"]
    # The sizes of stored tensors are exact. The file also has a header.
    assert found["directions"][0] == found["directions"][1] > 0
    assert found["PrefixCache"][0] == found["PrefixCache"][1] > 0
    assert found["delta file"][1] * 1e6 == 4 * 64 * 160
    assert 0 < found["delta file"][0] * 1e6 - 4 * 64 * 160 < 4096


def test_the_page_has_the_recorded_rows(rehearsal: Any) -> None:
    assert rehearsal.report() == rehearsal.PAGE.read_text(encoding="utf-8")
