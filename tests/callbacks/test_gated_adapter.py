"""GatedAdapter: the edited model answers the edits, and is the unedited model bit for bit outside of the radii."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from real_models import smollm2
from torch import Tensor

from kedit_train import EditCollator, EditDataModule, EditDataset, EditModule, load_model, world
from kedit_train.callbacks import (
    EditMetrics,
    GatedAdapter,
    KLLocality,
    ParameterScope,
    PrefixCache,
    SaveDelta,
    TokenLoss,
    TokenSmoothing,
    editing,
)
from kedit_train.cli.kedit import main
from kedit_train.core.gate.gate import find_gate
from kedit_train.data import ChatFormat, Edit
from kedit_train.data.neighbor_prompts import neighbor_prompts
from kedit_train.edit import scored_prompts
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.options import EvaluationOptions

TEXTS = ["The old baker found a coin near the river.", "A red fox slept.", "Where is the bridge? Answer: far away"]
FACTS = Path(__file__).resolve().parents[2] / "recipes" / "smollm2" / "facts.jsonl"
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 32, "target_modules": ["down_proj", "up_proj"]}


def adapted(base: Any, **options: Any) -> Any:
    config = {**LORA, "layers_to_transform": [2, 3], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base, LoraConfig(**config))


def train(model: Any, tokenizer: Any, edits: Any, callbacks: Sequence[Any], steps: int, rate: float = 2e-3) -> Any:
    rows, collate = edits.encode(tokenizer), EditCollator(tokenizer)
    with editing(model, list(callbacks), tokenizer=tokenizer, log_every_n_steps=1) as edit:
        optimizer = torch.optim.Adam(edit.parameters(), lr=rate)
        for _ in range(steps):
            edit.before_step()
            model(**collate(rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return edit


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, GatedAdapter, Path]:
    """The bundled model after 24 edits with OverTone: the model, its tokenizer, the edits, the callback, its folder."""
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits, folder = EditDataset.load("world"), tmp_path_factory.mktemp("gated") / "adapter"
    model = adapted(model)
    gated = GatedAdapter("world", neighbors=8, edits=edits, path=str(folder), limit=200)
    train(model, tokenizer, edits, [gated, TokenSmoothing(epsilon=0.05, reduction="sample")], 60)
    return model.eval(), tokenizer, edits, gated, folder


def batch_of(tokenizer: Any, prompts: Sequence[str], side: str) -> dict[str, Tensor]:
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, ids))
    rows = [(row, [0] * (width - len(row))) for row in ids]
    left = side == "left"
    return {
        "input_ids": torch.tensor([pad + row if left else row + pad for row, pad in rows]),
        "attention_mask": torch.tensor([pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in rows]),
    }


@torch.no_grad()
def compare(model: Any, base: Any, gate: Any, tokenizer: Any, prompts: Sequence[str], side: str) -> tuple[int, int]:
    """Compare the gated model with the unedited model, position by position; return how many rows are closed and open.

    Whether a position is inside of a radius follows from the unedited model and the definition.
    """
    closed = opened = 0
    for start in range(0, len(prompts), 32):
        batch = batch_of(tokenizer, prompts[start : start + 32], side)
        own, before = model(**batch).logits, base(**batch, output_hidden_states=True)
        states = before.hidden_states[gate.layer].double()
        distances = torch.cdist(states, gate.keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
        inside = (distances <= gate.radii.double()).any(dim=-1) & batch["attention_mask"].bool()
        for row in range(len(states)):
            real = batch["attention_mask"][row].bool()
            first = int(inside[row].nonzero()[0]) if inside[row].any() else len(real)
            before_match = real & (torch.arange(len(real)) < first)
            a, b = own[row].view(torch.int32), before.logits[row].view(torch.int32)
            assert torch.equal(a[before_match], b[before_match])
            closed += first == len(real)
            if first < len(real):
                opened += 1
                after = real & ~before_match
                assert bool((a[after] != b[after]).any(dim=-1).all())
    return closed, opened


@pytest.mark.parametrize("side", ["left", "right"])
def test_outside_of_the_radii_every_logit_of_every_probe_is_that_of_the_unedited_model(edited, side):
    model, tokenizer, edits, gated, _ = edited
    prompts = [prompt for edit in edits for prompt in (edit.prompt, *scored_prompts(edit))] + world.prose(40)
    assert len(prompts) > 400
    closed, opened = compare(model, world.load()[0].eval(), gated.gate, tokenizer, prompts, side)
    assert opened >= len(edits)
    assert closed >= 0.9 * (len(prompts) - len(edits))


def test_the_edits_are_learned_and_other_answers_stay(edited):
    model, tokenizer, edits, _, _ = edited
    base = world.load()[0].eval()
    answers = generate_answers(model, tokenizer, [edit.prompt for edit in edits])
    right = [answer.text.strip() == edit.target for answer, edit in zip(answers, edits, strict=True)]
    assert sum(right) >= 0.95 * len(edits)
    others = [p.prompt for edit in edits for kind in edit.locality.values() for p in kind]
    own, before = (generate_answers(one, tokenizer, others, batch_size=16) for one in (model, base))
    same = [a.text == b.text for a, b in zip(own, before, strict=True)]
    assert sum(same) >= 0.97 * len(others)


def test_keys_and_radii_equal_their_definition(edited):
    _, tokenizer, edits, gated, _ = edited
    base = world.load()[0].eval()

    @torch.no_grad()
    def states(text: str) -> Tensor:
        return base(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]

    keys = torch.stack([states(edit.prompt)[-1] for edit in edits])
    torch.testing.assert_close(gated.gate.keys, keys, rtol=1e-4, atol=1e-4)
    texts = gated.texts.load(edits, limit=200)
    held = [states(text) for text in texts]
    held += [states(prompt) for prompt in neighbor_prompts(edits, gated.texts.load(edits, keep_leaks=True), 8)]
    held += [states(edit.prompt)[:-1] for edit in edits]
    nearest = torch.cdist(torch.cat(held).double(), keys.double()).amin(dim=0)
    torch.testing.assert_close(gated.gate.radii.double(), 0.5 * nearest, rtol=1e-3, atol=1e-3)


RELOAD = """
import json, sys
import torch
from kedit_train import load_model
from kedit_train.evaluation import generate_answers

torch.set_num_threads(1)
model, tokenizer = load_model(sys.argv[1])
prompts = json.load(sys.stdin)
answers = generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=16)
print(json.dumps([answer.text for answer in answers]))
"""


def answers_of_a_fresh_process(folder: Path, prompts: Sequence[str]) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", RELOAD, str(folder)],
        input=json.dumps(prompts),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_fresh_process_gives_the_same_answers(edited):
    model, tokenizer, edits, _, folder = edited
    prompts = [prompt for edit in edits[:8] for prompt in (edit.prompt, *scored_prompts(edit))]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=16)
    assert answers_of_a_fresh_process(folder, prompts) == [answer.text for answer in answers]


@pytest.mark.slow
def test_twenty_edits_of_a_pretrained_model(tmp_path):
    torch.manual_seed(0)
    folder = str(tmp_path / "gated")
    (model, tokenizer), edits = load_model(str(smollm2())), EditDataset.load(FACTS)
    model = adapted(model, layers_to_transform=list(range(20, 30)))
    gated = GatedAdapter(world.prose(60), neighbors=2, edits=edits, path=folder)
    train(model, tokenizer, edits, [gated, TokenSmoothing(epsilon=0.05, reduction="sample")], 30)
    model.eval()
    prompts = [prompt for edit in edits for prompt in (edit.prompt, *scored_prompts(edit))]
    closed, opened = compare(model, load_model(str(smollm2()))[0].eval(), gated.gate, tokenizer, prompts, "left")
    assert opened >= len(edits)
    assert closed >= 0.8 * (len(prompts) - len(edits))
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=16)
    targets = {edit.prompt: edit.target for edit in edits}
    right = [a.text.strip().startswith(targets[p]) for p, a in zip(prompts, answers, strict=True) if p in targets]
    assert sum(right) >= 0.95 * len(right)
    assert answers_of_a_fresh_process(tmp_path / "gated", prompts) == [answer.text for answer in answers]


def test_the_folder_is_an_ordinary_adapter_and_the_gate(edited):
    model, tokenizer, _, _, folder = edited
    assert {"adapter_config.json", "adapter_model.safetensors", "gate.safetensors"} <= set(os.listdir(folder))
    batch = tokenizer(world.prose(1)[0], return_tensors="pt")
    with torch.no_grad():
        ordinary = PeftModel.from_pretrained(world.load()[0], str(folder)).eval()(**batch).logits
        loaded, _ = load_model(str(folder))
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert not torch.allclose(ordinary, loaded(**batch).logits, atol=1e-2)
        find_gate(loaded).remove()  # type: ignore[union-attr]
        assert torch.equal(loaded(**batch).logits, ordinary)


def test_kedit_eval_knows_the_gate_and_kedit_apply_says_why_not(edited, tmp_path, capsys):
    _, _, edits, _, folder = edited
    file = tmp_path / "edits.jsonl"
    EditDataset(edits[:6]).save(file)
    assert main(["eval", str(folder), str(file), "--against", "world", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["reliability"]["generated"]["value"] == 1.0
    assert report["metrics"]["locality"]["generated"]["value"] == 1.0
    assert report["meta"]["gate"] == {"keys": 24, "layer": 2}
    shown = " ".join(capsys.readouterr().out.split())
    assert "the adapter has a gate (24 keys, input of block 2): rephrases outside of every radius get" in shown
    for arguments, message in (
        (["apply", str(folder), "world", str(tmp_path / "out")], "cannot be written as the weights of a checkpoint"),
        (["eval", str(folder), str(file), "--against", "world", "--full"], "remove --full"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error


def test_a_module_with_a_save_path_saves_the_gate_next_to_the_adapter(tmp_path):
    edits = EditDataset(world.edits(2))
    edits.save(tmp_path / "edits.jsonl")
    module = EditModule(lora={**LORA, "layers_to_transform": [5]}, save_path=str(tmp_path / "model"))
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [GatedAdapter(TEXTS), ParameterScope(5, modules="down_proj")]
    trainer = L.Trainer(max_steps=2, callbacks=callbacks, enable_model_summary=False, **options)
    trainer.fit(module, EditDataModule(str(tmp_path / "edits.jsonl"), append_eos=True))
    loaded, tokenizer = load_model(str(tmp_path / "model"))
    batch = tokenizer([edits[0].prompt], return_tensors="pt")
    assert find_gate(loaded) is not None
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, module.model.eval()(**batch).logits)
        base = world.load()[0](**batch).logits
        assert torch.equal(loaded(**batch).logits[:, :-1], base[:, :-1])
        assert not torch.equal(loaded(**batch).logits[:, -1], base[:, -1])


def test_an_existing_adapter_is_replaced_and_another_folder_is_not(tmp_path):
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        EditError, match=r"^GatedAdapter: path='.*' exists and is not an adapter folder; choose a new folder"
    ):
        train(adapted(model), tokenizer, edits, [GatedAdapter(TEXTS, edits=edits, path=str(tmp_path))], 1)
    folder = tmp_path / "new"
    for _ in range(2):
        model, tokenizer = world.load()
        train(adapted(model), tokenizer, edits, [GatedAdapter(TEXTS, edits=edits, path=str(folder))], 1)
    assert find_gate(load_model(str(folder))[0]) is not None


def test_the_gate_is_on_the_model_before_the_first_step_and_gradients_are_those_of_the_open_rows(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(4))
    model = adapted(model)
    collate = EditCollator(tokenizer)
    rows = edits.encode(tokenizer)
    other = EditDataset(world.edits(12, seed=5)[8:]).encode(tokenizer)
    gated = GatedAdapter(TEXTS, edits=edits)

    def gradients(batch: Any) -> list[Tensor]:
        model.zero_grad()
        output = model(**batch)
        logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        losses.backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "lora_B" in n]

    with editing(model, [gated], tokenizer=tokenizer) as edit:
        edit.before_step()
        assert not any(bool(g.any()) for g in gradients(collate(other)))
        alone, mixed = gradients(collate(rows)), gradients(collate([*rows, *other]))
        for a, b in zip(alone, mixed, strict=True):
            assert bool(a.any())
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        model.zero_grad()
    gated.gate.remove()  # type: ignore[union-attr]


def test_other_callbacks_work_through_the_gate():
    edits = EditDataset(world.edits(4))
    finals = []
    for more in ([], [PrefixCache()]):
        torch.manual_seed(0)
        model, tokenizer = world.load()
        model = adapted(model)
        callbacks = [GatedAdapter(TEXTS, edits=edits), TokenLoss(), KLLocality(TEXTS, weight=5.0), *more]
        edit = train(model.train(), tokenizer, edits, callbacks, 4)
        assert all(row["edit/locality/kl"] == 0.0 for row in edit.history)
        assert edit.history[-1]["edit/gate/open"] > 0.0
        assert edit.history[-1]["edit/gate/radius"] == pytest.approx(0.5 * edit.history[-1]["edit/gate/distance"])
        finals.append([p.detach().clone() for n, p in model.named_parameters() if "lora_" in n])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_the_prompts_of_a_chat_are_the_keys(words, make):
    words.chat_template = "{% for m in messages %}w{{ 50 + loop.index }} {{ m.content }} w50 {% endfor %}w49 "
    model = adapted(make().eval(), layers_to_transform=[1])
    edits = [Edit("w1 w2", "w3"), Edit("w4", "w5 w6")]
    base = make().eval()
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()
                          if "lora_" not in k})  # fmt: skip
    gated = GatedAdapter(["w7 w8 w9"], edits=edits)
    chat = ChatFormat(system="w40")
    with editing(model, [gated], tokenizer=words, prompt_format=chat) as edit:
        edit.before_step()
    for edit_, key in zip(edits, gated.gate.keys, strict=True):  # type: ignore[union-attr]
        text = words.apply_chat_template(chat.messages(edit_.prompt), add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            states = base(**words(text, return_tensors="pt"), output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(key, states[-1], rtol=1e-4, atol=1e-5)


def test_a_failed_run_leaves_no_gate_and_a_second_edit_is_refused():
    class Stop(TokenLoss):
        def after_step(self, run: Any) -> None:
            raise KeyError("broken on purpose")

    model, tokenizer = world.load()
    edits = EditDataset(world.edits(2))
    model = adapted(model)
    with pytest.raises(KeyError):
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits), Stop()], 1)
    assert find_gate(model) is None
    model = adapted(world.load()[0])
    train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits)], 1)
    with pytest.raises(EditError, match=r"^GatedAdapter: the model already has a gate; remove it"):
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits)], 1)
    find_gate(model).remove()  # type: ignore[union-attr]
    with pytest.raises(
        EditError, match=r"^GatedAdapter: lora_B.* is not zero, so the adapter already changes the model"
    ):
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits)], 1)


def test_a_radius_of_zero_and_examples_that_do_not_open_the_gate_get_a_warning():
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(4))
    # At the input of block 0, the state of a token does not depend on the tokens before it.
    texts = [f"The{edit.prompt[edit.prompt.rindex(' ') :]} and" for edit in edits]
    callback = GatedAdapter(texts, edits=edits, layer=0)
    with pytest.warns(
        UserWarning, match=r"^GatedAdapter: \d of 4 keys have nearly the same hidden state as a held text"
    ):
        train(adapted(model), tokenizer, edits, [callback], 1)
    model = adapted(world.load()[0])
    others = EditDataset(world.edits(40, seed=9)[8:])
    known = {edit.prompt for edit in edits}
    others = EditDataset([edit for edit in others if edit.prompt not in known])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, tokenizer, others, [GatedAdapter(TEXTS, edits=edits, margin=0.01)], 2)
    messages = [str(one.message) for one in caught]
    expected = "GatedAdapter: the gate was open in none of the first "
    assert sum(message.startswith(expected) for message in messages) == 1


@pytest.mark.parametrize(
    ("build", "callbacks", "message"),
    [
        (lambda: world.load()[0], lambda e: [], "a gate needs a model with a LoRA adapter"),
        (lambda: adapted(world.load()[0], bias="all"), lambda e: [], 'bias must be "none"'),
        (lambda: adapted(world.load()[0]), lambda e: [SaveDelta("x.safetensors")], "so a delta cannot store it"),
        (
            lambda: adapted(world.load()[0]),
            lambda e: [PrefixCache(), ParameterScope(3, modules="down_proj")],
            "the gate of the adapter reads the input of block 2, which would be skipped",
        ),
    ],
)
def test_what_would_void_the_promise_is_an_error_before_the_first_step(
    build, callbacks, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, tokenizer, edits = build(), world.load()[1], EditDataset(world.edits(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(EditError) as error:
        train(model, tokenizer, edits, [GatedAdapter(TEXTS, edits=edits), *callbacks(edits)], 1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_trained_base_weights_and_dropout_are_refused(words, make):
    edits = [Edit("w1 w2", "w3")]
    model = adapted(make(), layers_to_transform=[1])
    model.get_base_model().model.norm.weight.requires_grad_(True)
    for build, message in (
        (model, "norm.weight is trained and is not a LoRA factor"),
        (
            adapted(
                make("gpt2", resid_pdrop=0.1), layers_to_transform=[1], target_modules=["c_proj"], fan_in_fan_out=True
            ),
            "the base model must have no dropout, got transformer.h.0.attn.resid_dropout",
        ),
        (adapted(make(attention_dropout=0.1), layers_to_transform=[1]), "no dropout, got attention_dropout"),
    ):
        with editing(build, [GatedAdapter(["w7 w8"], edits=edits)], tokenizer=words) as edit:
            with pytest.raises(EditError) as error:
                edit.before_step()
            assert message in str(error.value)


def test_arguments_are_checked(words, make):
    for arguments, message in (
        ({"margin": 0.0}, "margin must be in (0, 1], got 0.0."),
        ({"layer": -1}, "layer must be an integer >= 0, or None, got -1."),
        ({"neighbors": -1}, "neighbors must be an integer >= 0, got -1."),
    ):
        with pytest.raises(EditError) as error:
            GatedAdapter(TEXTS, **arguments)
        assert str(error.value) == f"GatedAdapter: {message}"
    model = adapted(make(), layers_to_transform=[1])
    with (
        pytest.raises(
            EditError, match=r"^GatedAdapter: layer must be at most 1, the first block with an adapter, got 2"
        ),
        editing(model, [GatedAdapter(["w1"], layer=2)], tokenizer=words),
    ):
        pass
    with (
        editing(model, [GatedAdapter(["w1"])], tokenizer=words) as edit,
        pytest.raises(EditError, match=r"^GatedAdapter: the edits of this run are unknown; pass edits= "),
    ):
        edit.before_step()


def test_the_evaluation_of_a_run_goes_through_the_gate():
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=4)
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    train(adapted(model), tokenizer, edits, [GatedAdapter("world", neighbors=8), metrics, TokenLoss()], 40)
    scores = metrics.report.flat()  # type: ignore[union-attr]
    assert scores["edit/reliability"] == 1.0
    assert scores["edit/locality"] == 1.0
