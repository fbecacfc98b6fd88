"""GatedAdapter: the edited model answers the edits, and is the unedited model bit for bit outside of the radii."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.gated import TEXTS, adapted, batch_of, compare, edited_world, train
from installed import CACHE
from real_models import smollm2
from torch import Tensor

from kedit_train import EditCollator, EditDataset, load_model, world
from kedit_train.callbacks import (
    EditMetrics,
    GatedAdapter,
    KLLocality,
    PrefixCache,
    TokenLoss,
    TokenSmoothing,
    editing,
)
from kedit_train.data import ChatFormat, Edit
from kedit_train.data.neighbor_prompts import neighbor_prompts
from kedit_train.edit import scored_prompts
from kedit_train.evaluation import generate_answers
from kedit_train.evaluation.options import EvaluationOptions

FACTS = Path(__file__).resolve().parents[2] / "recipes" / "smollm2" / "facts.jsonl"


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, GatedAdapter, Path]:
    return edited_world(tmp_path_factory.mktemp("gated") / "adapter")


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


@pytest.mark.filterwarnings("ignore:GatedAdapter. .* do not open the gate")
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
        # The rows of the KL penalty are not counted.
        assert edit.history[-1]["edit/gate/open"] == 1.0
        assert edit.history[-1]["edit/gate/radius"] == pytest.approx(0.5 * edit.history[-1]["edit/gate/distance"])
        finals.append([p.detach().clone() for n, p in model.named_parameters() if "lora_" in n])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


@pytest.mark.parametrize("others", [False, True])
def test_held_texts_with_an_edited_prompt_are_left_out_or_open_the_gate_where_they_begin_with_it(others):
    model, tokenizer = world.load()
    edits = EditDataset(world.edits(2))
    prompt = edits[0].prompt
    texts = [*TEXTS, f"{prompt} a place by the river.", f"The old baker said: {prompt} a place.", prompt]
    gated = GatedAdapter(texts, edits=edits)
    # The run scores other edits, so it does not know that the texts contain the prompts that are trained.
    metrics = [EditMetrics(world.edits(8)[6:], every_n_steps=0, show=False)] if others else []
    message = (
        r"2 of 6 texts on which the adapter must not act begin with an edited prompt, so"
        if others
        else "3 of 6 texts contain an evaluation prompt .* left out, because the adapter must act on such prompts"
    )
    with pytest.warns(UserWarning, match=f"^GatedAdapter: {message}"):
        train(adapted(model), tokenizer, edits, [gated, *metrics], 1)
    gate: Any = gated.gate
    with torch.no_grad():
        model.eval()
        cache = getattr(model(**batch_of(tokenizer, texts, "right"), use_cache=True), CACHE)
    state, length = cache.layers[-1].keys[:, 0, :, 0], len(tokenizer(prompt)["input_ids"])
    assert not state[:3].any()
    assert not (others and state[4].any())
    assert state[3].tolist() == [False] * (length - 1) + [True] * (state.shape[1] - length + 1)
    gate.remove()


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


def test_the_evaluation_of_a_run_goes_through_the_gate():
    torch.manual_seed(0)
    model, tokenizer = world.load()
    edits = EditDataset.load("world", limit=4)
    metrics = EditMetrics(edits, every_n_steps=0, show=False, evaluation=EvaluationOptions(max_new_tokens=8))
    train(adapted(model), tokenizer, edits, [GatedAdapter("world", neighbors=8), metrics, TokenLoss()], 40)
    scores = metrics.report.flat()  # type: ignore[union-attr]
    assert scores["edit/reliability"] == 1.0
    assert scores["edit/locality"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs():
    tests = doctest.DocTestParser().get_doctest(inspect.getdoc(GatedAdapter) or "", {}, "GatedAdapter", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(tests)
    assert runner.tries > 5
    assert not runner.failures
