"""GradientMask on models of every kind: forecasters, adapters, tied embeddings, and several models in turn."""

from __future__ import annotations

import copy

import pytest
import torch
from callbacks.masked_runs import EDITS, bits, train
from safetensors.torch import load_file
from torch import Tensor, nn

from kedit_train.callbacks import GradientMask, TokenSmoothing, editing
from kedit_train.errors import EditError


class Forecaster(nn.Module):
    """A model of time series: a recurrent layer, a norm, two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.conv = nn.GRU(2, 4, batch_first=True), nn.Conv1d(4, 6, 3)
        self.up, self.norm, self.out = nn.ConvTranspose1d(6, 5, 2), nn.LayerNorm(4), nn.Linear(5, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.out(self.up(self.conv(self.norm(self.rnn(series)[0]).mT)).mT)


@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_other_models_can_be_masked_by_magnitude_at_random_or_from_a_file(tmp_path, score, granularity):
    model, series = Forecaster(), torch.randn(3, 10, 2)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    before = copy.deepcopy(model)
    path = tmp_path / "masks" / "mask.safetensors"
    for mask in (
        GradientMask(score, density=0.5, granularity=granularity, save_path=path),
        GradientMask(mask_path=path),
    ):
        with editing(model, [mask]) as edit:
            optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2, weight_decay=0.1)
            for _ in range(2):
                edit.before_step()
                model(series).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        chosen = load_file(path)
        for name, parameter in model.named_parameters():
            assert not bool(((bits(parameter) != bits(before.get_parameter(name))) & ~chosen[name]).any())
    assert not torch.equal(model.rnn.weight_ih_l0, before.rnn.weight_ih_l0)
    if granularity == "row":
        assert torch.equal(chosen["rnn.bias_hh_l0"], chosen["rnn.weight_hh_l0"][:, 0])
        assert torch.equal(chosen["up.bias"], chosen["up.weight"][0, :, 0])
        assert torch.equal(chosen["conv.bias"], chosen["conv.weight"][:, 0, 0])
    if granularity == "column":
        assert not chosen["conv.bias"].any()
        assert chosen["up.weight"].flatten(1).all(1).sum() == 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_equal_scores_are_an_error_and_adapters_can_be_masked(make, words, ids):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["down_proj"])
    model = peft.get_peft_model(make(), config)
    # B starts at zero, so the gradient of A is zero everywhere.
    with (
        pytest.raises(EditError, match=r"^GradientMask: .*lora_A.*: .* all scores are 0; choose another score"),
        editing(model, [GradientMask(edits=EDITS)], tokenizer=words) as edit,
    ):
        edit.before_step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with editing(model, [mask := GradientMask("random", density=0.3), TokenSmoothing()], tokenizer=words) as edit:
        train(model, edit, torch.optim.AdamW(edit.parameters(), lr=0.1, weight_decay=0.1), ids, lambda: None)
        for name, parameter in model.named_parameters():
            differs = bits(parameter) != bits(before[name])
            assert not bool((differs & mask._frozen[name]).any() if name in mask._frozen else differs.any())
            assert ("lora_" in name) == bool(differs.any())


def test_tied_embeddings_have_one_mask(make, words, ids):
    model = make(tie_word_embeddings=True)
    before = copy.deepcopy(model)
    with editing(
        model, [mask := GradientMask("fisher", density=0.1, granularity="row", edits=EDITS)], tokenizer=words
    ) as edit:
        assert "lm_head.weight" not in edit.run.scope
        train(model, edit, torch.optim.AdamW(edit.parameters(), lr=0.1), ids, lambda: None)
        differs = bits(model.lm_head.weight) != bits(before.lm_head.weight)
        assert not bool((differs & mask._frozen["model.embed_tokens.weight"]).any())
        assert differs.any()


def test_one_instance_masks_several_models_in_turn(make, words, ids):
    mask = GradientMask(edits=iter(EDITS))
    for family in ("llama", "gpt2"):
        model = make(family)
        with editing(model, [mask], tokenizer=words) as edit:
            train(model, edit, torch.optim.SGD(edit.parameters(), lr=0.1), ids, lambda: None, steps=1)
            assert mask._frozen.keys() == edit.run.scope.keys()
