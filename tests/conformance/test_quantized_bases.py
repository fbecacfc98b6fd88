"""LoRA on 8-bit and 4-bit bases of bitsandbytes: the adapter is trained, the quantized weights keep every bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import HOSTS
from conformance.settings import SHORT, TEXTS
from torch import Tensor

from kedit_train import world
from kedit_train.callbacks import (
    EditMetrics,
    GatedAdapter,
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    SaveDelta,
    SecondOrderLocality,
    SubjectValues,
    TokenLoss,
    editing,
)
from kedit_train.data import EditDataset
from kedit_train.errors import EditError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, so no quantized base can be made")

# bitsandbytes uses parts of torch that torch will remove, and its 8-bit layers compute in fp16.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("checkpoint")]
BITS = (8, 4)
STEPS = 2

WORKS: dict[str, Callable[[Any], list[Any]]] = {
    "ParameterScope": lambda edits: [],
    "KLLocality": lambda edits: [KLLocality(texts=TEXTS, batch_size=2)],
    "NullSpace": lambda edits: [NullSpace(texts=TEXTS)],
    "PolyakStep": lambda edits: [TokenLoss("overtone"), PolyakStep()],
    "PrefixCache": lambda edits: [PrefixCache()],
    "NormBall": lambda edits: [NormBall(5e-4)],
    "EditMetrics": lambda edits: [EditMetrics(edits, every_n_steps=1, limit=2, show=False, evaluation=SHORT)],
}
REFUSED: dict[str, tuple[Callable[[str], list[Any]], str]] = {
    "LowCurvature": (lambda path: [LowCurvature(texts=TEXTS)], "must not contain LoRA factors"),
    "SecondOrderLocality": (
        lambda path: [TokenLoss("cross_entropy"), SecondOrderLocality(texts=TEXTS)],
        "must not contain LoRA factors",
    ),
    "SubjectValues": (
        lambda path: [TokenLoss("cross_entropy"), SubjectValues(TEXTS, edits=world.edits(2))],
        "must not contain LoRA factors",
    ),
    "GatedAdapter": (lambda path: [GatedAdapter(TEXTS)], "LoRA on linear layers without quantization"),
    "SaveDelta": (lambda path: [SaveDelta(path)], r"is quantized \(u?int8\)"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tiny Llama whose matrices have whole blocks of 64 weights, as the 4-bit layers need them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder, tokenizer = str(tmp_path_factory.mktemp("tiny")), world.load()[1]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(checkpoint: str, bits: int) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


def lora(target: str = "down_proj") -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM")


def adapted(checkpoint: str, bits: int, target: str = "down_proj") -> Any:
    from peft import get_peft_model

    torch.manual_seed(0)
    return get_peft_model(load(checkpoint, bits), lora(target))


def frozen(model: Any) -> dict[str, Tensor]:
    """Return copies of all weights that are not LoRA factors, by their names without adapters."""
    named = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}
    return {name.replace("base_model.model.", "").replace(".base_layer", ""): value for name, value in named.items()}


def factors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_B." in name}


def edits() -> EditDataset:
    return EditDataset(world.edits(n=8))


def train(host: str, model: Any, callbacks: list[Any]) -> Any:
    """Train the adapter of a model. SFTTrainer adds the adapter itself."""
    tokenizer, used = world.load()[1], [ParameterScope("1-2", modules="mlp.down_proj"), *callbacks]
    if host != "SFTTrainer":
        from peft import get_peft_model

        model = get_peft_model(model, lora())
        HOSTS[host](model, tokenizer, edits(), used, STEPS)
        return model
    return HOSTS[host](model, tokenizer, edits(), used, STEPS, peft_config=lora()).model


def pairs() -> list[Any]:
    """Return pairs of callback and host. The default run takes each callback in one host."""
    hosts = ("Trainer", "SFTTrainer", "Lightning", "loop")
    return [
        pytest.param(name, host, marks=() if host == hosts[i % len(hosts)] else pytest.mark.slow)
        for i, name in enumerate(WORKS)
        for host in hosts
    ]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "host"), pairs())
def test_the_adapter_is_trained_and_the_quantized_weights_keep_every_bit(
    name: str, host: str, bits: int, checkpoint: str
) -> None:
    torch.manual_seed(0)
    model = load(checkpoint, bits)
    before = frozen(model)
    assert sum(not value.is_floating_point() for value in before.values()) == 28
    trained = train(host, model, WORKS[name](edits()))
    after = frozen(trained)
    assert after.keys() == before.keys()
    # TRL converts floating-point weights of a quantized model to another dtype.
    quantized = [name for name, value in before.items() if not value.is_floating_point()]
    assert all(torch.equal(after[name], before[name]) for name in quantized)
    moved = {int(n.split(".layers.")[1].split(".")[0]) for n, value in factors(trained).items() if bool(value.any())}
    assert moved == {1, 2}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_is_refused_before_training(name: str, bits: int, checkpoint: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    model = adapted(checkpoint, bits)
    before = frozen(model)
    with pytest.raises(EditError, match=f"^{name}: .*{why}") as error:
        HOSTS["loop"](
            model, world.load()[1], edits(), [ParameterScope("1-2"), *make(str(tmp_path / "e.safetensors"))], STEPS
        )
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert not any(bool(value.any()) for value in factors(model).values())
    assert all(torch.equal(value, before[name]) for name, value in frozen(model).items())


@pytest.mark.parametrize("bits", BITS)
def test_a_scope_of_quantized_weights_is_refused(bits: int, checkpoint: str) -> None:
    with pytest.raises(EditError, match=r"quantized weights \(u?int8\), which cannot be trained; .* PEFT adapter"):
        HOSTS["loop"](load(checkpoint, bits), world.load()[1], edits(), [ParameterScope(1, modules="mlp")], STEPS)


def gradients(model: Any) -> dict[str, Tensor | None]:
    """Return the gradients of the B factors for a fixed batch."""
    ids = torch.arange(20).view(2, 10)
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if ".lora_B." in n}
    return copy.deepcopy(found)


def use(model: Any) -> None:
    """Run the model as an evaluation does."""
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(6).view(1, 6))


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_an_evaluation_does_not_take_the_gradient_of_a_4_bit_base(target: str, checkpoint: str) -> None:
    expected = gradients(adapted(checkpoint, 4, target))
    model = adapted(checkpoint, 4, target)
    with editing(model, [ParameterScope(modules="lora_B")]) as edit:
        use(model)
        actual = gradients(model)
        model.zero_grad()
        edit.run.close()
    for name, value in expected.items():
        assert value is not None
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


def test_a_4_bit_base_whose_weights_are_packed_is_refused(checkpoint: str) -> None:
    model = adapted(checkpoint, 4, "q_proj")
    use(model)
    state = model.base_model.model.model.layers[0].mlp.up_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("on this CPU, bitsandbytes does not pack 4-bit weights")
    # This is why the base is refused: the adapters would learn nothing.
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        assert all(value is None for value in gradients(model).values())
    with pytest.raises(EditError, match="packed them for inference on this CPU; load the model again") as error:
        HOSTS["loop"](model, world.load()[1], edits(), [ParameterScope("1-2")], STEPS)
    assert "\n" not in str(error.value)
