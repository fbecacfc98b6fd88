"""``ControlMetrics``: measure the reward and the speed of greedy answers with and without control."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from kedit_train.arguments import Rule, at_least, check_arguments, integer_from
from kedit_train.control.controlled import controlled, find_value_sites
from kedit_train.control.records import read_records
from kedit_train.control.rewards import check_reward, compute_rewards
from kedit_train.control.sites import Layer
from kedit_train.control.value import ValueModel
from kedit_train.data.chat_format import PromptFormat
from kedit_train.data.prompts import encode_prompts
from kedit_train.data.tokenization import context_length
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.asking.batching import model_device, unwrap_model
from kedit_train.evaluation.asking.generate import generate_answers

_PROMPTS = Rule(
    "a list of at least one text",
    lambda given: not isinstance(given, str) and len(given) > 0 and all(isinstance(prompt, str) for prompt in given),
)


def measure_control(
    model: nn.Module,
    tokenizer: Any,
    value: ValueModel,
    prompts: Sequence[str],
    reward: Callable[..., Sequence[float]],
    *,
    generation: dict[str, Any] | None = None,
    **control: Any,
) -> dict[str, Any]:
    """Generate greedy answers without and with control, and return their mean rewards and speeds.

    With control, the answers are generated in a :func:`~kedit_train.control.controlled` block. In the keys of the
    result, "before" means without control, and "after" means with control.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        value: the value function.
        prompts: prompts on which the value function was not trained.
        reward: a function ``reward(prompts, completions)`` that returns one number per answer.
        generation: arguments of ``generate_answers``.
        control: arguments of ``controlled``.

    Returns:
        ``reward_before`` and ``reward_after`` (mean over the prompts), ``tokens_per_second_before`` and
        ``tokens_per_second_after`` (generated tokens), ``mean_change`` (see ``Control.mean_change``), and the answers
        as ``answers_before`` and ``answers_after``.

    Raises:
        EditError: there are no prompts, or an argument of ``controlled`` is not valid.
    """
    check_arguments("measure_control", prompts=(prompts, _PROMPTS))
    options: dict[str, Any] = {"stops": (), "max_new_tokens": 64, **(generation or {})}

    def ask() -> tuple[list[str], float, float]:
        # The first call of a model is slower than later calls, so one answer is generated before the timed answers.
        generate_answers(model, tokenizer, prompts[:1], **options)
        began = time.perf_counter()
        answers = generate_answers(model, tokenizer, prompts, **options)
        seconds = max(1e-9, time.perf_counter() - began)
        texts = [answer.text for answer in answers]
        # Equal prompts are generated once.
        generated = dict(zip(prompts, answers, strict=True)).values()
        tokens = sum(len(answer.ids) + answer.ended for answer in generated)
        return texts, float(compute_rewards(reward, prompts, texts).mean()), tokens / seconds

    before, reward_before, speed_before = ask()
    with controlled(model, value, **control) as done:
        after, reward_after, speed_after = ask()
    return {
        "reward_before": reward_before,
        "reward_after": reward_after,
        "tokens_per_second_before": speed_before,
        "tokens_per_second_after": speed_after,
        "mean_change": done.mean_change,
        "answers_before": before,
        "answers_after": after,
    }


class ControlMetrics(Callback):
    """At the end of training, log the reward and the speed of greedy answers with and without control.

    With control, the answers are generated in a :func:`~kedit_train.control.controlled` block.
    The reward and the prompt format are those of the :class:`ResponseDataModule`. The metrics are
    ``control/reward_before``, ``control/reward_after``, ``control/tokens_per_second_before``,
    ``control/tokens_per_second_after`` and ``control/mean_change``. All loggers of the trainer receive them.

    Args:
        prompts: a list or a file of prompts, in the formats of :class:`ResponseDataModule`. The prompts of the
            ``ResponseDataModule`` are not allowed here, because the value function is trained on them.
        step_size: as for :func:`~kedit_train.control.controlled`.
        steps: as for ``controlled``.
        radius: as for ``controlled``.
        layers: as for ``controlled``.
        first_token: as for ``controlled``.
        max_new_tokens: maximum length of an answer, in tokens.
        batch_size: number of prompts per forward pass.

    Raises:
        EditError: an argument is out of range. Before training starts, the error is also raised if a layer has no value
            function, a prompt is too long, the reward cannot score a prompt, or a prompt is also a prompt of the
            :class:`ResponseDataModule`.

    Example:
        >>> from kedit_train.control import ControlMetrics
        >>> ControlMetrics(["The sky is"], step_size=1.0).radius
        0.1
    """

    def __init__(
        self,
        prompts: Any,
        *,
        step_size: float,
        steps: int = 1,
        radius: float = 0.1,
        layers: Sequence[Layer] | None = None,
        first_token: bool = False,
        max_new_tokens: int = 64,
        batch_size: int = 16,
    ) -> None:
        check_arguments(
            self,
            step_size=(step_size, at_least(0)),
            steps=(steps, integer_from(0)),
            radius=(radius, at_least(0)),
            first_token=(first_token, Rule("True or False", lambda given: isinstance(given, bool))),
            max_new_tokens=(max_new_tokens, integer_from(1)),
            batch_size=(batch_size, integer_from(1)),
        )
        with reported_by("ControlMetrics"):
            self.prompts: list[str] = [record["prompt"] for record in read_records(prompts)]
        self.step_size = step_size
        self.steps = steps
        self.radius = radius
        self.layers = layers
        self.first_token = first_token
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.result: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the data module is a :class:`ResponseDataModule`."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "reward"):
            raise EditError(
                f"the data module must be a ResponseDataModule, got {type(data).__name__}; pass a ResponseDataModule "
                "to Trainer.fit, or remove ControlMetrics.",
                "ControlMetrics",
            )

    def check_prompts(self, data: Any, module: Any) -> None:
        """Check the arguments ``prompts`` and ``layers`` of this callback.

        The data module calls this method before it samples responses.

        Args:
            data: the :class:`ResponseDataModule`.
            module: the :class:`ValueModule`.

        Raises:
            EditError: a layer has no value function, a prompt is too long, the reward cannot score a prompt, or a
                prompt is also a prompt of ``data``.
        """
        trained = {record["prompt"] for record in data.records}
        with reported_by("ControlMetrics"):
            if both := [prompt for prompt in self.prompts if prompt in trained]:
                raise EditError(
                    f"prompts must not contain a prompt of the ResponseDataModule, got {both[0][:80]!r}; remove this "
                    "prompt from one of the two lists."
                )
            context = context_length(unwrap_model(module.language_model).config)
            encode_prompts(module.tokenizer, self.prompts, context, data.prompt_format)
            find_value_sites(module.language_model, module.value, self.layers)
            check_reward(data.reward, self.prompts, [""] * len(self.prompts))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate the answers, log the metrics and print them.

        ``ValueModule.on_train_end`` has already saved the value function, so an error in this method does not change
        the saved file.
        """
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        formats: PromptFormat = data.prompt_format
        generation = {
            "prompt_format": formats, "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size,
            "progress": False,
        }  # fmt: skip
        self.result = measure_control(
            module.language_model,
            module.tokenizer,
            # The trainer has moved the module to the CPU, but not the language model.
            copy.deepcopy(module.value).to(model_device(module.language_model)),
            self.prompts,
            data.reward,
            generation=generation,
            step_size=self.step_size,
            steps=self.steps,
            radius=self.radius,
            layers=self.layers,
            first_token=self.first_token,
        )
        numbers = {f"control/{key}": value for key, value in self.result.items() if isinstance(value, float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        r = self.result
        print(
            f"reward {r['reward_before']:.3f} -> {r['reward_after']:.3f} on {len(self.prompts)} prompts; "
            f"{r['tokens_per_second_before']:.0f} -> {r['tokens_per_second_after']:.0f} tokens per second"
        )
