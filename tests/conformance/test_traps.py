"""Known traps of training loops, where an edit would fail silently. Each is avoided or is an error."""

from __future__ import annotations

import ast
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.hosts import ARGUMENTS, HOSTS, Rows, collator
from conformance.settings import TEXTS
from installed import older
from transformers import Trainer, TrainerCallback, TrainingArguments

from kedit_train import world
from kedit_train.callbacks import EditCallback, KLLocality, NormBall, ParameterScope, TokenLoss, TokenSmoothing, editing
from kedit_train.data import EditDataset
from kedit_train.errors import EditError
from kedit_train.functional import overtone_target, smoothed_loss, uniform_target
from kedit_train.functional.divergence import token_divergence

TESTS = Path(__file__).resolve().parents[1]
# Trap -> the tests which show that it is avoided.
TRAPS = {
    "1 TRL ignores model.loss_function": ["test_traps::test_every_host_trains_on_the_loss_of_the_formula"],
    "2 Lightning steps before the backward pass": ["test_traps::test_lightning_skips_by_the_gradients_of_this_step"],
    "3 a separate backward pass bypasses DDP": ["test_ranks::test_two_processes_end_with_the_weights_of_one"],
    "4 freezing after DDP has wrapped the model": [
        "test_ranks::test_an_unsupported_strategy_is_an_error_before_the_first_step",
        "test_ranks::test_late_freezing_works_if_ddp_finds_unused_parameters",
    ],
    "5 logging at the end of a step swallows the loss": ["test_traps::test_every_log_row_has_the_loss_and_the_metrics"],
    "6 PEFT's disable_adapter makes frozen parameters trainable": [
        "test_traps::test_adapters_out_of_scope_stay_frozen_with_kl_locality",
        "test_other_trainers::test_adapters_out_of_scope_stay_frozen",
    ],
    "7 FSDP2 ignores a replaced p.data": [
        "test_fsdp2::test_the_kl_divergence_is_not_silently_zero",
        "test_fsdp2::test_reference_model_gives_the_model_before_the_edit_and_restores_it",
    ],
    "8 a resumed run takes the checkpoint for the reference model": [
        "test_resume::test_a_killed_and_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one",
        "test_traps::test_a_resumed_run_restores_the_reference_values",
    ],
    "9 wrapped optimizers have no hooks": ["test_traps::test_every_step_of_a_wrapped_optimizer_is_counted_once"],
    "10 a loss that ignores num_items_in_batch": [
        "test_conditions::test_accumulated_batches_give_the_weights_of_one_batch"
    ],
    "11 earlier loggers do not see the metrics": ["test_traps::test_later_callbacks_see_the_metrics_of_a_log_row"],
    "12 fabric.launch() inside fabric run": ["test_started_runs::test_a_recipe_runs_on_two_processes"],
    "13 every process trains alone": [
        "test_traps::test_a_trainer_with_another_number_of_processes_is_an_error",
        "test_started_runs::test_a_recipe_runs_on_two_processes",
        "test_processes::test_the_process_count_must_be_that_of_the_launcher",
    ],
    "14 bf16-true makes bf16 the default dtype": ["test_traps::test_losses_do_not_depend_on_the_default_dtype"],
    "15 a gradient hook that returns something": [
        "test_mask_holds::test_gradients_outside_the_mask_are_zero_until_the_run_ends"
    ],
    "16 DPO cannot copy a model that was not loaded from a path": [
        "test_traps::test_a_preference_trainer_that_fails_releases_the_model",
        "test_other_trainers::test_scope_mask_ball_and_anchor_are_exact",
    ],
    "17 gloo aborts a process during its exit": ["test_traps::test_scripts_with_several_processes_end_together"],
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_listed_tests_exist(trap: str) -> None:
    for where in TRAPS[trap]:
        file, name = where.split("::")
        (path,) = TESTS.rglob(f"{file}.py")
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in names, where


def scope() -> ParameterScope:
    return ParameterScope(layers=0.5, modules="mlp.down_proj")


@pytest.fixture
def edits() -> EditDataset:
    return EditDataset(world.edits(n=4))


class Losses(EditCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer", "Lightning"])
def test_every_host_trains_on_the_loss_of_the_formula(host: str, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    batch = collator(tokenizer)(edits.encode(tokenizer))
    with torch.no_grad():
        logits = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logits, labels = logits[labels != -100], labels[labels != -100]
    size = len(tokenizer) if len(tokenizer) < logits.shape[-1] else None
    expected = smoothed_loss(logits, uniform_target(logits, labels, label_weight=0.5, vocab_size=size))[0].mean()
    stock = torch.nn.functional.cross_entropy(logits, labels)
    losses = Losses()
    HOSTS[host](model, tokenizer, edits, [scope(), TokenLoss("uniform", label_weight=0.5), losses], 1)
    assert abs(float(expected - stock)) > 0.1
    assert losses.losses[:1] == pytest.approx([float(expected)], rel=1e-4)


class Gradients(EditCallback):
    """Records the gradients in skip_step, and those that the optimizer used."""

    def attach(self, run: Any) -> None:
        self.decided: list[float] = []
        self.stepped: list[float] = []

    def skip_step(self, run: Any) -> bool:
        self.decided.append(sum(float(p.grad.sum()) for p in run.scope.values()))
        return False

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        # Lightning calls zero_grad() before the backward pass, inside the closure.
        run = self.run
        self.stepped += [float(p.grad.sum()) for p in run.scope.values() if p.grad is not None]


def test_lightning_skips_by_the_gradients_of_this_step(edits: EditDataset) -> None:
    model, tokenizer = world.load()
    gradients = Gradients()
    HOSTS["Lightning"](model, tokenizer, edits, [scope(), gradients], 3)
    assert len(gradients.decided) == 3
    assert gradients.decided[:2] == gradients.stepped[:2]
    assert len(set(gradients.decided)) == 3


@pytest.mark.parametrize("host", ["Trainer", "SFTTrainer"])
def test_every_log_row_has_the_loss_and_the_metrics(host: str, edits: EditDataset) -> None:
    model, tokenizer = world.load()
    used = [scope(), TokenSmoothing(), KLLocality(texts=TEXTS)]
    trainer = HOSTS[host](model, tokenizer, edits, used, 3, logging_steps=1)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all({"edit/locality/kl", "edit/tokens/active", "edit/drift/relative"} <= set(row) for row in rows)


def test_adapters_out_of_scope_stay_frozen_with_kl_locality(edits: EditDataset) -> None:
    from peft import LoraConfig

    class Trainable(EditCallback):
        def attach(self, run: Any) -> None:
            self.names: set[str] = set()

        def skip_step(self, run: Any) -> bool:
            self.names |= {name for name, p in run.model.named_parameters() if p.requires_grad}
            return False

    model, tokenizer = world.load()
    lora = LoraConfig(r=4, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM")
    trainable = Trainable()
    used = [scope(), TokenSmoothing(), KLLocality(texts=TEXTS), trainable]
    trainer = HOSTS["SFTTrainer"](model, tokenizer, edits, used, 2, peft_config=lora)
    prefix = "base_model.model.model.layers.3.mlp.down_proj.lora_"
    assert trainable.names == {f"{prefix}{factor}.default.weight" for factor in "AB"}
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)


class KeepReference(EditCallback):
    def finish(self, run: Any) -> None:
        self.reference = {name: value.clone() for name, value in run.reference.items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("late", [False, True], ids=["callbacks=", "add_callback"])
def test_a_resumed_run_restores_the_reference_values(late: bool, edits: EditDataset, tmp_path: Path) -> None:
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    tokenizer = world.load()[1]
    for steps in (2, 4):
        model, keep = world.load()[0], KeepReference()
        used = [scope(), NormBall(1e-2), keep]
        built = trainer(model, edits, tokenizer, [] if late else used, steps=steps, **saving)
        built.args.restore_callback_states_from_checkpoint = True
        for callback in used if late else []:
            # The callback joins after the weights of the checkpoint have been loaded.
            built.add_callback(callback)
        built.train(resume_from_checkpoint=steps == 4)
    base = world.load()[0]
    assert keep.reference
    for name, value in keep.reference.items():
        assert torch.equal(value.view(torch.int32), base.get_parameter(name).detach().view(torch.int32))
        assert not torch.equal(value, model.get_parameter(name))


def trainer(model: Any, edits: Any, tokenizer: Any, used: list[Any], steps: int = 2, **extra: Any) -> Trainer:
    arguments = TrainingArguments(
        **({"output_dir": tempfile.mkdtemp(), "max_steps": steps} | ARGUMENTS | extra)  # type: ignore[arg-type]
    )
    arguments.remove_unused_columns = False
    rows = Rows(edits.encode(tokenizer))
    return Trainer(model, arguments, train_dataset=rows, data_collator=collator(tokenizer), callbacks=used)


@pytest.mark.parametrize("host", HOSTS)
def test_every_step_of_a_wrapped_optimizer_is_counted_once(host: str, edits: EditDataset) -> None:
    class Steps(EditCallback):
        def attach(self, run: Any) -> None:
            self.steps: list[int] = []

        def after_step(self, run: Any) -> None:
            self.steps.append(run.step)

    model, tokenizer = world.load()
    steps = Steps()
    HOSTS[host](model, tokenizer, edits, [scope(), steps], 3)
    assert steps.steps == [1, 2, 3]


def test_later_callbacks_see_the_metrics_of_a_log_row(edits: EditDataset) -> None:
    class Logger(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.rows += [dict(logs)] if "loss" in logs else []

    class Earlier(Logger):
        pass

    class Later(Logger):
        pass

    model, tokenizer = world.load()
    earlier, later = Earlier(), Later()
    done = HOSTS["Trainer"](model, tokenizer, edits, [earlier, scope(), later], 2)
    assert all("edit/drift/relative" in row for row in later.rows)
    assert all("edit/drift/relative" in row for row in done.state.log_history if "loss" in row)
    # The earlier callback gets the row before the metrics are added. For the trainer's own loggers there is a warning.
    assert len(earlier.rows) == len(later.rows) == 2
    built = trainer(world.load()[0], edits, tokenizer, [scope()])
    built.args.report_to = ["wandb", "tensorboard"]
    with pytest.warns(UserWarning, match=r"edit/\* metrics do not reach tensorboard"):
        built.callback_handler.call_event("on_train_begin", built.args, built.state, built.control)


def test_a_trainer_with_another_number_of_processes_is_an_error(
    edits: EditDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = world.load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone = trainer(model, edits, tokenizer, [scope()])
    # On a machine without GPUs, each process takes itself for the only one, unless use_cpu=True is set.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EditError, match=r"2 processes were started but the trainer uses 1") as refusal:
        alone.train()
    assert "\n" not in str(refusal.value)
    with pytest.raises(EditError, match=r"2 processes were started but the trainer uses 1"):
        HOSTS["Lightning"](world.load()[0], tokenizer, edits, [scope()], 2, devices=1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    logits, before, labels = torch.randn(7, 50, dtype=dtype), torch.randn(7, 50, dtype=dtype), torch.arange(7)

    def everything() -> list[torch.Tensor]:
        found = [*overtone_target(logits, labels), uniform_target(logits, labels)]
        for target in (found[0], found[-1]):
            found += smoothed_loss(logits, target, epsilon=0.01)
        return found + [token_divergence(before, logits, direction=way) for way in ("forward", "reverse", "jsd")]

    expected = everything()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_the_weights_of_tokens_do_not_depend_on_the_default_dtype(reduction: Any) -> None:
    model, tokenizer = world.load()
    batch = collator(tokenizer)(EditDataset(world.edits(n=7)).encode(tokenizer))
    losses = []
    with editing(model, [scope(), TokenSmoothing(reduction=reduction)], tokenizer=tokenizer) as edit:
        edit.before_step()
        for default in (torch.float32, torch.bfloat16):
            # Fabric and Lightning do this around a forward pass with precision="bf16-true".
            torch.set_default_dtype(default)
            try:
                losses.append(model(**batch).loss)
            finally:
                torch.set_default_dtype(torch.float32)
    assert losses[1].dtype == torch.float32
    assert torch.equal(losses[0], losses[1])


def test_a_preference_trainer_that_fails_releases_the_model() -> None:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer = world.load()[1]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1
        )
    )
    rows = Dataset.from_list([{"prompt": "The fox", "chosen": " slept", "rejected": " ran"}])
    # DPOTrainer loads the reference model by the path of this model, which has none. TRL 0.24 copies the model instead,
    # but refuses these two options together.
    options = {"precompute_ref_log_probs": True, "sync_ref_model": True} if older("trl", "1.0") else {}
    arguments = DPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], **options)
    with pytest.raises(Exception, match=r"(?i)repo|name_or_path|model"):
        DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[scope()])
    # The trainer fails after its callbacks have joined, and does not tell them. The next loop takes the model over.
    assert not all(p.requires_grad for p in model.parameters())
    with editing(model, [scope()]) as edit:
        assert len(edit.parameters()) == 1
    assert all(p.requires_grad for p in model.parameters())


def test_scripts_with_several_processes_end_together() -> None:
    starting = [path for path in TESTS.rglob("*.py") if re.search(r"world_size=2|torchrun started", path.read_text())]
    assert {path.name for path in starting} >= {"ranks.py", "shards.py", "test_mask_holds.py"}
    for path in starting:
        if path.name != Path(__file__).name:
            assert re.search(r"dist\.barrier\(\)[^=]*os\._exit\(0\)", path.read_text()), path
