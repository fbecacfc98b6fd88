"""Second moments of layer inputs, compared with every token read by itself, without padding."""

from __future__ import annotations

import pytest
import torch
from core.drift.drift_runs import SCOPES, SEQUENCES, run_on
from torch import nn

from kedit_train.core import EditRun
from kedit_train.core.drift.linear_layers import find_linear_layers
from kedit_train.core.drift.model_batches import model_input_batches, text_batches
from kedit_train.core.drift.second_moments import SecondMoment, input_moments
from kedit_train.errors import EditError

CPU = torch.device("cpu")


def inputs_by_hand(model: nn.Module, name: str) -> torch.Tensor:
    """Return the inputs of the module, [tokens, d], reading one sequence at a time."""
    inputs: list[torch.Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double()))
    with torch.no_grad():
        for sequence in SEQUENCES:
            model(input_ids=torch.tensor([sequence]))
    handle.remove()
    return torch.cat(inputs)


def moments_of(run: EditRun, batch_size: int) -> dict[str, SecondMoment]:
    layers = find_linear_layers(run.model, run.scope)
    return input_moments(run, layers, run.model, text_batches(SEQUENCES, batch_size, CPU))


@pytest.mark.parametrize("family", SCOPES)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_moments_count_every_real_token_and_no_padding(tiny, family, batch_size):
    model = tiny(family).eval()
    run = run_on(model, SCOPES[family])
    model.train()
    moments = moments_of(run, batch_size)
    assert model.training
    model.eval()
    for name, moment in moments.items():
        inputs = inputs_by_hand(model, name)
        assert moment.count == len(inputs) == 13
        torch.testing.assert_close(moment.mean.double(), inputs.T @ inputs / 13, rtol=1e-4, atol=1e-5)


def test_moments_belong_to_the_model_before_the_edit_in_fp32_and_leave_no_hooks(tiny):
    model = tiny("llama").eval().bfloat16()
    run = run_on(model, ["mlp.down_proj", "mlp.up_proj"])
    before = moments_of(run, 2)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        for parameter in run.scope.values():
            parameter.add_(1.0)
    after = moments_of(run, 2)
    for name in run.scope:
        assert before[name].sum.dtype is torch.float32
        assert torch.equal(before[name].sum, after[name].sum)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_forward_passes_stop_at_the_last_layer_in_scope(tiny):
    model = tiny("llama").eval()
    run = run_on(model, ["0.mlp.down_proj"])
    # The first use of the head calls the model, so it comes before the calls are counted.
    run.head()
    calls = []
    handle = model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    moments = moments_of(run, 1)
    handle.remove()
    # The first pass is complete, because it shows how often each module is called.
    assert len(SEQUENCES) > 1
    assert len(calls) == 1
    (name,) = moments
    inputs = inputs_by_hand(model, name)
    assert moments[name].count == len(inputs)
    torch.testing.assert_close(moments[name].mean.double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


def test_a_module_that_is_called_twice_in_a_pass_is_read_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.shared(self.shared(x)))

    model = Twice()
    run = run_on(model, ["shared", "last"])
    batches = [torch.randn(4, 3), torch.randn(5, 3)]
    layers = find_linear_layers(run.model, run.scope)
    moments = input_moments(run, layers, run.model, model_input_batches(batches, CPU))
    assert moments["shared.weight"].count == 2 * 9
    assert moments["last.weight"].count == 9


@pytest.mark.parametrize("lengths", [(1, 5, 5), (5, 5, 1)])
def test_a_module_whose_number_of_calls_depends_on_the_input_is_read_completely(lengths):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = torch.zeros(len(x), 3)
            for step in x.unbind(1):
                state = self.cell(state + step)
            return state

    model = Recurrent()
    run = run_on(model, ["cell"])
    layers = find_linear_layers(run.model, run.scope)
    batches = [torch.randn(3, length, 3) for length in lengths]
    moments = input_moments(run, layers, run.model, model_input_batches(batches, CPU))
    assert moments["cell.weight"].count == 3 * sum(lengths)


def test_the_output_head_reads_every_token_if_it_is_in_scope(tiny):
    model = tiny("llama").eval()
    (moment,) = moments_of(run_on(model, ["lm_head"]), 2).values()
    inputs = inputs_by_hand(model, "lm_head.weight")
    assert moment.count == 13
    torch.testing.assert_close(moment.mean.double(), inputs.T @ inputs / 13, rtol=1e-4, atol=1e-5)


def test_a_model_that_reads_no_text_gives_moments_of_its_own_inputs():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    run = run_on(model, ["0", "2"])
    series = [torch.randn(3, 4), (torch.randn(2, 4),), {"input": torch.randn(5, 4)}]
    layers = find_linear_layers(model, run.scope)
    moments = input_moments(run, layers, model, model_input_batches(series, CPU))
    inputs = torch.cat([series[0], series[1][0], series[2]["input"]])
    torch.testing.assert_close(moments["0.weight"].mean, inputs.T @ inputs / 10)
    hidden = torch.tanh(model[0](inputs)).detach()
    torch.testing.assert_close(moments["2.weight"].mean, hidden.T @ hidden / 10)


def test_moments_of_two_samples_add_up():
    first, second = torch.randn(5, 3), torch.randn(2, 3)
    moments = []
    for vectors in (first, second, torch.cat([first, second])):
        moment = SecondMoment(torch.zeros(3, 3))
        moment.update(vectors)
        moments.append(moment)
    both = moments[0] + moments[1]
    assert both.count == moments[2].count == 7
    torch.testing.assert_close(both.mean, moments[2].mean)


class EverySecondToken(nn.Module):
    """Reads [batch, sequence] and multiplies every second position only."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.unused = nn.Embedding(61, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.linear(self.embedding(input_ids)[:, ::2])


def test_inputs_that_cannot_be_matched_to_tokens_are_refused():
    model = EverySecondToken()
    run = run_on(model, ["linear"])
    with pytest.raises(EditError, match=r"linear\.weight must .* got a tensor of shape \(4, 3, 4\) .* batch_size=1"):
        moments_of(run, 4)
    (moment,) = moments_of(run, 1).values()
    assert moment.count == 3 + 1 + 1 + 2


def test_a_module_that_is_never_called_is_refused():
    model = EverySecondToken()
    run = run_on(model, ["unused"])
    with pytest.raises(EditError, match=r"unused\.weight was never called on the texts"):
        moments_of(run, 1)
