"""PrefixCache in a loop: the same bits in every kind of model, and an error or a warning where they would not be."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from kedit_train.callbacks import KLLocality, ParameterScope, PrefixCache, TokenSmoothing, editing
from kedit_train.errors import EditError

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
STILL = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
KINDS = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**BASE),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**BASE, head_dim=8, sliding_window=4, layer_types=KINDS),
    "gpt2": lambda: GPT2Config(**GPT2, **STILL),
    "mistral": lambda: MistralConfig(**BASE, sliding_window=4),
}
LENGTHS = [12, 5, 7, 9, 3, 12, 10, 4]


def build(family: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    made = FAMILIES[family]()
    for name, value in config.items():
        setattr(made, name, value)
    return AutoModelForCausalLM.from_config(made).train()


def batch(
    side: str = "right", width: int = 12, rows: slice = slice(None), positions: bool = False
) -> dict[str, Tensor]:
    """Rows of LENGTHS; first tokens are not supervised."""
    content = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(1))
    ids, mask = torch.zeros(8, width, dtype=torch.long), torch.zeros(8, width, dtype=torch.long)
    for i, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[i, where], mask[i, where] = content[i, :length], 1
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if positions:
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return {name: value[rows] for name, value in made.items()}


HALVES = [slice(0, 4), slice(4, 8)]


def train(model: Any, callbacks: list[Any], batches: list[Any], epochs: int = 3, **options: Any) -> tuple[Any, ...]:
    """(losses, weights, history)."""
    losses = []
    with editing(model, callbacks, log_every_n_steps=1, **options) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for inputs in batches * epochs:
            edit.before_step()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()], edit.history


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    weights = all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a[1], b[1], strict=True))
    return a[0] == b[0] and weights


def rates(history: list[dict[str, float]]) -> list[float]:
    return [row["edit/cache/hit_rate"] for row in history]


def scope(layers: Any = 3) -> ParameterScope:
    return ParameterScope(layers, "mlp")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_weights_are_the_same_bits(family: str, head: bool, side: str) -> None:
    batches = [batch(side, rows=half) for half in HALVES]
    more = [TokenSmoothing()] if head else []
    plain = train(build(family), [scope(), *more], batches)
    cached = train(build(family), [scope(), *more, PrefixCache()], batches)
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    tokens = sum(LENGTHS)
    assert cached[2][-1]["edit/cache/memory_bytes"] == tokens * 16 * 4
    assert cached[2][-1]["edit/cache/rows"] == 8
    # The bits are those of a trained model.
    assert not same(plain, train(build(family), [scope(), *more], batches, epochs=2))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_other_batches_and_other_padding_are_served_within_rounding(family: str) -> None:
    def batches(width: int) -> list[Any]:
        return [batch(width=width, rows=half) for half in HALVES]

    shuffled = [{name: value.flip(0) for name, value in batch(width=20, rows=half).items()} for half in HALVES]
    plain = train(build(family), [scope()], [*batches(12), *shuffled, *batches(32)], epochs=1)
    cached = train(build(family), [scope(), PrefixCache()], [*batches(12), *shuffled, *batches(32)], epochs=1)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-5, atol=1e-6)


def test_positions_that_are_given_serve_either_side_of_padding() -> None:
    batches = [batch(side, width, positions=True) for side, width in (("right", 12), ("left", 12), ("left", 15))]
    plain, cached = (train(build("gpt2"), [scope(), *more], batches, epochs=1) for more in ([], [PrefixCache()]))
    assert rates(cached[2]) == [0.0, 1.0, 1.0]
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-5, atol=1e-6)


def test_positions_that_the_model_counts_through_padding_are_other_rows() -> None:
    cached = train(build("gpt2"), [scope(), PrefixCache()], [batch("left", 12), batch("left", 13)], epochs=2)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0]
    assert cached[2][-1]["edit/cache/rows"] == 16


def test_beyond_memory_rows_go_to_disk_and_come_back_the_same(tmp_path: Path) -> None:
    batches = [batch(rows=half) for half in HALVES]
    plain = train(build(), [scope()], batches)
    cached = train(build(), [scope(), PrefixCache(memory=1500, folder=str(tmp_path / "rows"))], batches)
    assert same(plain, cached)
    assert rates(cached[2])[2:] == [1.0] * 4
    assert 0 < cached[2][-1]["edit/cache/memory_bytes"] <= 1500 < cached[2][-1]["edit/cache/disk_bytes"]
    assert list((tmp_path / "rows").iterdir()) == []


def test_beyond_memory_without_a_folder_rows_are_computed_again_and_it_says_so() -> None:
    batches = [batch(rows=half) for half in HALVES]
    plain = train(build(), [scope()], batches)
    with pytest.warns(UserWarning, match=r"limit of memory is reached with 4 rows; .*raise memory=, or name a folder="):
        cached = train(build(), [scope(), PrefixCache(memory=sum(LENGTHS[:4]) * 64)], batches)
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert cached[2][1]["edit/cache/rows_left_out"] == 4


def test_evaluation_in_between_runs_every_layer() -> None:
    model, calls = build(), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with editing(model, [scope(), PrefixCache()]) as edit:
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2)
        for step in range(3):
            edit.before_step()
            calls.clear()
            model(**batch()).loss.backward()
            assert len(calls) == (step == 0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                calls.clear()
                inside = model(**batch()).logits
                generated = model.generate(batch()["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
                assert len(calls) == 4
            ordinary = copy.deepcopy(model)
            assert torch.equal(ordinary(**batch()).logits, inside)
            assert torch.equal(
                generated,
                ordinary.generate(batch()["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0),
            )


def test_texts_that_must_stay_are_served(words: Any) -> None:
    # Of one length and all in every batch, so that rounding is the same in every draw.
    texts = [" ".join(f"w{(7 * i + j) % 59}" for j in range(6)) for i in range(4)]
    runs = []
    for more in ([], [PrefixCache()]):
        kl = KLLocality(texts, weight=10.0, batch_size=4)
        runs.append(train(build(), [scope(), TokenSmoothing(), kl, *more], [batch()], tokenizer=words))
    assert same(*runs)
    assert rates(runs[1][2]) == [0.0, 1.0, 1.0]
    assert runs[1][2][-1]["edit/cache/rows"] == 8 + 4
    assert runs[1][2][-1]["edit/locality/kl"] > 0


def test_precision_is_part_of_a_row_and_rows_keep_the_dtype_that_flows() -> None:
    model, inputs = build(), batch()
    with editing(model, [scope(), cache := PrefixCache()], log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.0)
        losses = []
        for half in (False, True, False, True):
            edit.before_step()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert rates(edit.history) == [0.0, 0.0, 1.0, 1.0]
        assert losses[:2] == losses[2:]
        assert losses[0] != losses[1]
    with editing(model.to(torch.bfloat16), [scope(), cache], log_every_n_steps=1) as edit:
        edit.before_step()
        model(**inputs)
        assert cache.metrics(edit.run)["edit/cache/memory_bytes"] == sum(LENGTHS) * 16 * 2


def test_adapters_in_upper_layers() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(layers: list[int]) -> Any:
        config = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=layers, task_type="CAUSAL_LM")
        return get_peft_model(build(), config)

    batches = [batch(rows=half) for half in HALVES]
    plain, cached = (train(adapted([2, 3]), [TokenSmoothing(), *m], batches) for m in ([], [PrefixCache()]))
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(EditError, match=r"layers\.0\.mlp\.down_proj\.lora_A.* is trained, and only the embedding lies"):
        train(adapted([0, 3]), [PrefixCache()], batches)


class Peeks(nn.Module):
    """A last layer that reads what the first one left beside the hidden states."""

    def __init__(self, layer: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        first.register_forward_hook(lambda module, args, output: setattr(self, "seen", args[0]))
        first.register_forward_hook(lambda module, args, output: setattr(self, "left", output * 2))

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        left, self.left = self.left, torch.zeros(())
        return self.layer(hidden, *args, **kwargs) + left


def refusals() -> dict[str, tuple[Any, list[Any], str]]:
    def peeking() -> Any:
        model = build()
        layers = model.model.layers
        layers[3] = Peeks(layers[3], layers[0])
        return model

    def compiled() -> Any:
        model = build()
        model.compile(backend="eager")
        return model

    def tied() -> Any:
        return build("llama", tie_word_embeddings=True)

    def bloom() -> Any:
        config = BloomConfig(vocab_size=61, hidden_size=16, n_layer=4, n_head=2)
        return AutoModelForCausalLM.from_config(config).train()

    return {
        "first layer": (build, [scope(0)], "only the embedding lies below layer 0"),
        "everything": (build, [], "only the embedding lies below layer 0"),
        "embedding": (
            build,
            [ParameterScope(modules=["embed_tokens", "layers.3.mlp"])],
            "model.embed_tokens.weight is trained and runs before layer 3",
        ),
        "tied": (
            tied,
            [ParameterScope(modules=["embed_tokens", "layers.3.mlp"])],
            "a tied head is its embedding",
        ),
        "compiled": (compiled, [scope()], "the model is compiled"),
        "reads more": (peeking, [scope()], "are not the same without the layers below 3"),
        "unknown": (bloom, [scope()], "no stack of layers that call each other in order"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_would_be_wrong_is_refused_before_the_first_step(case: str) -> None:
    make, callbacks, message = refusals()[case]
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(EditError) as error:
        train(model, [*callbacks, PrefixCache()], [batch()])
    assert message in str(error.value)
    assert str(error.value).startswith("PrefixCache: ")
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.base_model.modules())


def test_nothing_trained_is_refused() -> None:
    with editing(build().requires_grad_(False), [PrefixCache()]) as edit, pytest.raises(EditError) as error:
        edit.before_step()
    assert str(error.value) == (
        "PrefixCache: nothing is trained, so there is no first layer to begin at; widen the scope"
    )


@pytest.mark.parametrize("where", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_below_is_refused_where_it_is_active(where: str) -> None:
    def dropping() -> Any:
        return AutoModelForCausalLM.from_config(GPT2Config(**GPT2, **(STILL | {where: 0.1})))

    with pytest.raises(EditError, match=r"a random number was drawn below layer 3 \(dropout, noise on embeddings\)"):
        train(dropping().train(), [scope(), PrefixCache()], [batch()])
    # As Lightning trains what from_pretrained returned.
    cached = train(dropping().eval(), [scope(), PrefixCache()], [batch()])
    assert rates(cached[2]) == [0.0, 1.0, 1.0]


def test_rows_of_evaluation_mode_are_not_taken_for_those_of_training() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(**GPT2, **(STILL | {"embd_pdrop": 0.1}))).eval()
    with editing(model, [scope(), PrefixCache()]) as edit:
        edit.before_step()
        model(**batch())
        model.train()
        with pytest.raises(EditError, match="a random number was drawn"):
            model(**batch())


def test_recomputation_of_the_whole_backbone_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model = build()
    with editing(model, [scope(), PrefixCache()]) as edit:
        edit.before_step()
        inputs = batch()
        loss = checkpoint(lambda: model(**inputs).loss, use_reentrant=False)
        with pytest.raises(EditError, match="computed again in the backward pass"):
            loss.backward()


# transformers 5.23 has another name for it.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_layer_by_layer_is_served(reentrant: bool) -> None:
    def checkpointed() -> Any:
        model = build()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    batches = [batch(rows=half) for half in HALVES]
    plain = train(checkpointed(), [scope()], batches)
    cached = train(checkpointed(), [scope(), PrefixCache()], batches)
    assert same(plain, cached)
    assert rates(cached[2])[-1] == 1.0


def test_a_loop_that_compiles_the_model_is_told() -> None:
    model, inputs = build(), batch()
    with editing(model, [scope(), PrefixCache()]) as edit:
        compiled, optimizer = torch.compile(model, backend="eager"), torch.optim.SGD(edit.parameters(), lr=0.1)
        edit.before_step()
        compiled(**inputs).loss.backward()
        with pytest.warns(UserWarning, match="the loop compiles the model, so nothing is cached"):
            optimizer.step()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"attention_mask": torch.zeros(8, 1, 12, 12)}, "attention_mask is not of the shape"),
        (lambda x: {"attention_mask": x["attention_mask"].index_fill(1, torch.tensor([1]), 0)}, "has a gap"),
        (
            lambda x: {"position_ids": torch.arange(12).remainder(6).expand(8, 12)},
            r"start again within a row \(packing",
        ),
        (lambda x: {"input_ids": None, "inputs_embeds": torch.randn(8, 12, 16)}, "without input_ids"),
        (lambda x: {"output_hidden_states": True}, "output_hidden_states was given"),
        (lambda x: {"use_cache": True}, "use_cache=True was given"),
        (lambda x: {"labels": x["input_ids"]}, "a token next to padding is predicted from it"),
    ],
)
def test_a_batch_that_cannot_be_known_by_its_rows_is_computed_in_full(change: Any, reason: str) -> None:
    inputs = {**batch(), **change(batch())}
    plain = train(build(), [scope()], [inputs])
    with pytest.warns(UserWarning, match=rf"^PrefixCache: a batch is computed in full: .*{reason}"):
        cached = train(build(), [scope(), PrefixCache()], [inputs])
    assert same(plain, cached)
    assert cached[2][-1]["edit/cache/bypassed"] == 3
    assert cached[2][-1]["edit/cache/rows"] == 0


def replaced(model: Any, factor: float = 1.5) -> None:
    old = model.model.layers[1].mlp.up_proj
    old.weight = nn.Parameter(old.weight.detach() * factor, requires_grad=False)


def assigned(model: Any) -> None:
    state = {name: value.clone() for name, value in model.model.layers[1].state_dict().items()}
    state["mlp.up_proj.weight"] *= 1.5
    model.model.layers[1].load_state_dict(state, assign=True)
    model.model.layers[1].requires_grad_(False)


def written(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def other_storage(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.detach() * 1.5


UP = r"layers\.1\.mlp\.up_proj\.weight"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (written, UP),
        (other_storage, UP),
        (replaced, UP),
        (assigned, r"layers\.1\."),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(1.5), r"rotary_emb\.inv_freq"),
    ],
    ids=["in place", "storage", "replaced", "assigned", "buffer"],
)
def test_frozen_tensors_that_change_are_noticed(change: Any, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{name}.* was written to, although"):
        cached = train_changing(change, PrefixCache())
    assert cached[0] == train_changing(change)[0]
    assert rates(cached[2]) == [0.0, 1.0, 0.0, 1.0]


def test_buffers_written_with_the_values_they_have_are_none_that_changed() -> None:
    cached = train_changing(lambda model: model.model.rotary_emb.inv_freq.mul_(1.0), PrefixCache())
    assert rates(cached[2]) == [0.0, 1.0, 1.0, 1.0]


def other_module(model: Any) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    written(model)


def other_layer(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    written(model)


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)


@pytest.mark.parametrize("change", [other_module, other_layer, hooked])
def test_modules_and_hooks_that_come_or_go_below_are_noticed(change: Any) -> None:
    with pytest.warns(UserWarning, match="in full: a module or a hook below layer 3 was added, removed or replaced"):
        cached = train_changing(change, PrefixCache())
    assert cached[0] == train_changing(change)[0]
    assert cached[2][-1]["edit/cache/bypassed"] == 2


def test_hidden_states_asked_for_in_between_leave_the_cache_as_it_is() -> None:
    @torch.no_grad()
    def ask(model: Any) -> None:
        assert len(model(**batch(), output_hidden_states=True).hidden_states) == 5

    cached = train_changing(ask, PrefixCache())
    assert cached[0] == train_changing(ask)[0]
    assert rates(cached[2]) == [0.0, 1.0, 1.0, 1.0]


def train_changing(change: Any, *more: Any, at: int = 2, steps: int = 4) -> tuple[Any, ...]:
    """As train(), with a change of the model before one step."""
    model, inputs, losses = build(), batch(), []
    with editing(model, [scope(), *more], log_every_n_steps=1) as edit:
        optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
        for step in range(steps):
            edit.before_step()
            if step == at:
                change(model)
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()], edit.history


def traceless(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def test_what_leaves_no_trace_is_found_by_the_recheck_which_ends_the_caching() -> None:
    plain = train_changing(traceless, steps=7)
    with pytest.warns(UserWarning, match="no longer what was stored for the same rows") as said:
        cached = train_changing(traceless, PrefixCache(recheck=3), steps=7)
    assert len(said) == 1
    # One computed and three served; the fifth is compared, and this and the rest computed.
    assert [row.get("edit/cache/hit_rate") for row in cached[2][:5]] == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert cached[2][-1]["edit/cache/bypassed"] == 2
    assert cached[2][-1]["edit/cache/rows"] == 0
    assert cached[0][:2] == plain[0][:2]
    assert cached[0][2] != plain[0][2]


def test_a_recheck_that_finds_the_same_goes_on_even_under_other_padding() -> None:
    batches = [batch(width=width) for width in (12, 20, 32, 15, 12, 27)]
    plain = train(build(), [scope()], batches, epochs=1)
    cached = train(build(), [scope(), PrefixCache(recheck=2)], batches, epochs=1)
    assert rates(cached[2]) == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(cached[0], plain[0], rtol=1e-5, atol=1e-6)


def test_noise_of_a_hooks_own_generator_is_found_by_the_recheck() -> None:
    model, generator = build(), torch.Generator().manual_seed(0)

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * torch.randn(output.shape, generator=generator) if module.training else output

    model.model.embed_tokens.register_forward_hook(noise)
    with pytest.warns(UserWarning, match="no longer what was stored for the same rows"):
        train(model, [scope(), PrefixCache(recheck=1)], [batch()])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_eager_attention_gives_the_same_bits_with_keys_and_values_kept_as_without(family: str) -> None:
    def eager() -> Any:
        model = build(family)
        model.set_attn_implementation("eager")
        return model

    inputs = batch()
    batches = [batch(rows=half) for half in HALVES]
    plain, cached = (train(eager(), [scope(), *more], batches) for more in ([], [PrefixCache()]))
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    model = eager()
    with editing(model, [scope(), PrefixCache()]) as edit:
        edit.before_step()
        assert model(**inputs).past_key_values is not None
        # Of layers that did not run there are none, so nobody can go on from half of them.
        assert model(**inputs).past_key_values is None


def test_padding_without_labels_is_computed_in_full() -> None:
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    runs = []
    for more in ([], [PrefixCache()]):
        model, losses = build(), []
        with warnings.catch_warnings(record=True) as said, editing(model, [scope(), *more]) as edit:
            warnings.simplefilter("always")
            optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
            for _ in range(3):
                edit.before_step()
                # Of every position, padding too.
                loss = model(**inputs).logits.square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        runs.append((losses, [str(one.message) for one in said]))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == []
    assert len(runs[1][1]) == 1
    assert "it is padded and comes without labels" in runs[1][1][0]


def test_labels_are_known_though_an_anchor_runs_the_model_within_the_call() -> None:
    batches = [batch("left", rows=half) for half in HALVES]
    anchor = KLLocality(texts="batch", weight=3.0)
    plain = train(build(), [scope(), anchor], batches)
    cached = train(build(), [scope(), anchor, PrefixCache()], batches)
    assert same(plain, cached)
    assert rates(cached[2]) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert cached[2][-1]["edit/cache/bypassed"] == 0


def test_texts_of_several_lengths_are_served_though_they_have_no_labels(words: Any) -> None:
    texts = [" ".join(f"w{(7 * i + j) % 59}" for j in range(3 + i)) for i in range(4)]
    kl = KLLocality(texts, weight=10.0, batch_size=4)
    cached = train(build(), [scope(), kl, PrefixCache()], [batch()], tokenizer=words)
    assert rates(cached[2]) == [0.0, 1.0, 1.0]


def test_the_scale_of_an_adapter_below_is_part_of_a_row() -> None:
    from peft import LoraConfig, get_peft_model

    def changing(*more: Any) -> tuple[Any, ...]:
        config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model, losses = get_peft_model(build(), config), []
        model.requires_grad_(False)
        top = [p.requires_grad_() for n, p in model.named_parameters() if "layers.3" in n and "lora" in n]
        with editing(model, [*more], log_every_n_steps=1) as edit:
            optimizer = torch.optim.SGD(top, lr=0.1)
            for step in range(4):
                edit.before_step()
                if step == 2:
                    below: Any = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
                    below.scaling["default"] *= 3
                loss = model(**batch()).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, edit.history

    cached = changing(TokenSmoothing(), PrefixCache())
    assert cached[0] == changing(TokenSmoothing())[0]
    assert rates(cached[1]) == [0.0, 1.0, 0.0, 1.0]


def test_arguments() -> None:
    with pytest.raises(EditError, match="PrefixCache: 'much' is no size above 0"):
        PrefixCache(memory="much")
    with pytest.raises(EditError, match="PrefixCache: recheck=-1 is below 0"):
        PrefixCache(recheck=-1)
    with pytest.raises(EditError, match="two PrefixCache callbacks on one model"):
        train(build(), [scope(), PrefixCache(), PrefixCache()], [batch()])
    with pytest.raises(EditError, match="is a file; name a folder"):
        train(build(), [scope(), PrefixCache(folder=__file__)], [batch()])
