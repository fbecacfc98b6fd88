"""Edit a model with TRL's ``SFTTrainer``. Fields of the configuration add the callbacks."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from kedit_train.arguments import check_arguments, one_of
from kedit_train.callbacks import (
    ActiveSet,
    BatchAnchor,
    ContextTeacher,
    EditCallback,
    EditMetrics,
    ForecastMetrics,
    ForgetFirst,
    ForgettingBudget,
    GatedAdapter,
    GradientMask,
    KLLocality,
    LowCurvature,
    NormBall,
    NullSpace,
    OutputAnchor,
    ParameterScope,
    PolyakStep,
    PrefixCache,
    SaveDelta,
    SecondOrderLocality,
    StopWhenEdited,
    SubjectTokens,
    SubjectValues,
    TokenLoss,
    TokenSmoothing,
    WeightAnchor,
)
from kedit_train.core.answer_end import decide_together
from kedit_train.core.gate.adapter_source import check_not_gated
from kedit_train.data import Edit, EditDataset
from kedit_train.data.answer_end import AppendEos, EndDecision
from kedit_train.data.chat_format import PROMPT_FORMAT, describe_format, read_format, thinks
from kedit_train.errors import EditError, reported_by
from kedit_train.evaluation.reporting import model_card as card
from kedit_train.optional import require
from kedit_train.trainer_fields import callback_arguments

with require("trl", extra="trl"):
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

CALLBACKS: dict[str, type[EditCallback]] = {
    "parameter_scope": ParameterScope,
    "gradient_mask": GradientMask,
    "subject_tokens": SubjectTokens,
    "subject_values": SubjectValues,
    "gated_adapter": GatedAdapter,
    "forget_first": ForgetFirst,
    "token_loss": TokenLoss,
    "token_smoothing": TokenSmoothing,
    "context_teacher": ContextTeacher,
    "kl_locality": KLLocality,
    "batch_anchor": BatchAnchor,
    "output_anchor": OutputAnchor,
    "forgetting_budget": ForgettingBudget,
    "weight_anchor": WeightAnchor,
    "norm_ball": NormBall,
    "null_space": NullSpace,
    "low_curvature": LowCurvature,
    "second_order_locality": SecondOrderLocality,
    "polyak_step": PolyakStep,
    "prefix_cache": PrefixCache,
    "active_set": ActiveSet,
    "edit_metrics": EditMetrics,
    "forecast_metrics": ForecastMetrics,
    "stop_when_edited": StopWhenEdited,
    "save_delta": SaveDelta,
}
# On the command line, the arguments of a callback are a JSON string.
Arguments = dict[str, Any] | str | None

_APPEND_EOS: dict[str, AppendEos] = {"auto": "auto", "true": True, "false": False}


def _help(question: str) -> dict[str, str]:
    return {"help": f"{question} Adds a callback. Value: its arguments as a mapping or as JSON; {{}} for the defaults."}


@dataclass
class EditSFTConfig(SFTConfig):
    """TRL's ``SFTConfig`` with one additional field per callback of this package.

    Each of these fields holds the arguments of its callback. For example, ``parameter_scope: {layers: 0.7}`` adds
    ``ParameterScope(layers=0.7)``. On the command line, write ``--parameter_scope '{"layers": 0.7}'``. The value ``{}``
    or ``true`` adds the callback with default arguments. If the field of a callback is not set, the callback is not
    added. ``TrlParser`` reads the configuration from YAML and the command line. Three more fields are listed below.

    Args:
        edits: a file that :meth:`EditDataset.load` reads, or "world" for the bundled edits. The edits are passed to all
            callbacks that need edits, for example for the evaluation. If the trainer gets no ``train_dataset``, it also
            trains on these edits.
        prompt_format: the format of the prompts in training and evaluation. "plain" does not change the prompts. "chat"
            uses the chat template of the tokenizer. "question" frames every prompt as a question. For a system prompt
            or earlier messages, set a mapping with the arguments of :class:`~kedit_train.ChatFormat`.
        append_eos: whether the targets of an ``EditDataset`` end with end-of-text: true, false or "auto". "auto" works
            as in :class:`~kedit_train.modules.EditDataModule`.

    Raises:
        EditError: the value of a callback field is neither a mapping nor true, or has an argument that does not exist.

    Example:
        >>> from kedit_train import EditSFTConfig
        >>> args = EditSFTConfig("runs/example", bf16=False, use_cpu=True, norm_ball={"radius": 0.1}, active_set=True)
        >>> [type(callback).__name__ for callback in args.edit_callbacks()]
        ['NormBall', 'ActiveSet']

        The same fields in ``edit.yaml``, for ``TrlParser(EditSFTConfig).parse_args_and_config()``::

            output_dir: runs/mine
            edits: counterfact.json
            learning_rate: 5.0e-4
            per_device_train_batch_size: 32
            num_train_epochs: 10
            parameter_scope: {layers: 0.7, modules: mlp.down_proj}
            token_loss: {objective: overtone}
            kl_locality: {texts: texts_that_must_stay.txt}
            edit_metrics: {every_n_steps: 20}
            stop_when_edited: true
    """

    edits: str | None = field(default=None, metadata={"help": 'A file of edits in any known format, or "world".'})
    parameter_scope: Arguments = field(default=None, metadata=_help("Which parameters may change?"))
    gradient_mask: Arguments = field(default=None, metadata=_help("Which entries of the weight matrices may change?"))
    subject_tokens: Arguments = field(default=None, metadata=_help("Train only at the tokens of the subject."))
    subject_values: Arguments = field(default=None, metadata=_help("Change layer outputs mainly at the subjects."))
    gated_adapter: Arguments = field(default=None, metadata=_help("For which prompts may a LoRA adapter act?"))
    prompt_format: Arguments = field(
        default="plain", metadata={"help": "Format of the prompts: plain, chat or question."}
    )
    append_eos: str = field(default="auto", metadata={"help": "End targets with end-of-text: auto, true or false."})
    forget_first: Arguments = field(default=None, metadata=_help("Unlearn the old answers before the first step."))
    token_loss: Arguments = field(default=None, metadata=_help("What is the training target of each token?"))
    token_smoothing: Arguments = field(default=None, metadata=_help("Smooth the target of each token (OverTone)."))
    context_teacher: Arguments = field(default=None, metadata=_help("Imitate the unedited model that reads the fact."))
    kl_locality: Arguments = field(default=None, metadata=_help("On which texts should the predictions not change?"))
    batch_anchor: Arguments = field(default=None, metadata=_help("Penalize changed predictions on the training batch."))
    output_anchor: Arguments = field(default=None, metadata=_help("On which inputs should the outputs not change?"))
    forgetting_budget: Arguments = field(default=None, metadata=_help("Limit the divergence from the unedited model."))
    weight_anchor: Arguments = field(default=None, metadata=_help("Pull the weights towards their original values."))
    norm_ball: Arguments = field(default=None, metadata=_help("How far may the weights move?"))
    null_space: Arguments = field(default=None, metadata=_help("Keep layer outputs on given texts nearly the same."))
    low_curvature: Arguments = field(default=None, metadata=_help("Move weights in directions of low curvature only."))
    second_order_locality: Arguments = field(
        default=None, metadata=_help("Take steps that change predictions on given texts as little as possible.")
    )
    polyak_step: Arguments = field(default=None, metadata=_help("Choose the length of each step from the loss."))
    prefix_cache: Arguments = field(default=None, metadata=_help("Run the frozen first layers only once per example."))
    active_set: Arguments = field(default=None, metadata=_help("Skip edits that are already learned."))
    edit_metrics: Arguments = field(default=None, metadata=_help("Score the edits before, during and after training."))
    forecast_metrics: Arguments = field(default=None, metadata=_help("Measure a forecaster on new and on old inputs."))
    stop_when_edited: Arguments = field(default=None, metadata=_help("Stop when the edits are learned."))
    save_delta: Arguments = field(default=None, metadata=_help("Save the weight change as a file."))

    # EditSFTTrainer stores here whether targets end with end-of-text, and EditMetrics reads this value.
    answer_end: ClassVar[EndDecision | None] = None
    trained_edits: ClassVar[Sequence[Edit] | None] = None

    def __post_init__(self) -> None:
        for name, callback_class in CALLBACKS.items():
            setattr(self, name, callback_arguments(name, callback_class, getattr(self, name)))
        prompt_format = read_format(self.prompt_format)
        # The fields of a training configuration must be JSON data, so a ChatFormat is converted.
        self.prompt_format = describe_format(prompt_format)
        self.append_eos = str(self.append_eos).lower()
        check_arguments(
            self, prompt_format=(prompt_format, PROMPT_FORMAT), append_eos=(self.append_eos, one_of(_APPEND_EOS))
        )
        super().__post_init__()

    def edit_callbacks(self, edits: Sequence[Edit] | None = None) -> list[EditCallback]:
        """Create one callback for each callback field that is set.

        Args:
            edits: the edits for callbacks that have an argument ``edits``. If the field of a callback contains
                ``edits``, the callback uses those edits instead.
        """
        # With the default, "plain", the dataset may still be conversational. Callbacks then detect the format.
        declared = None if self.prompt_format == "plain" else read_format(self.prompt_format)
        shared = {"edits": edits, "prompt_format": declared}
        callbacks = []
        for name, callback_class in CALLBACKS.items():
            arguments = getattr(self, name)
            if arguments is None:
                continue
            known = inspect.signature(callback_class).parameters
            evaluation = arguments.get("evaluation") or {}
            if "evaluation" in known and isinstance(evaluation, Mapping):
                arguments = {**arguments, "evaluation": {"prompt_format": declared, **evaluation}}
            defaults = {key: value for key, value in shared.items() if key in known and value is not None}
            callbacks.append(callback_class(**defaults | arguments))
        return callbacks


class EditSFTTrainer(SFTTrainer):
    """TRL's ``SFTTrainer`` with the callbacks of an :class:`EditSFTConfig`.

    The trained weights are the same as with an ``SFTTrainer`` and the same callbacks. TRL writes a model card
    (``README.md``) next to every saved model. If ``EditMetrics`` is one of the callbacks, the model card gets a section
    on the edit. The section lists the edited facts, the constraints, the scores, the run time and the papers.

    Args:
        model: a hub name, a folder or a model, as for ``SFTTrainer``.
        args: the configuration.
        edits: the edits, used instead of ``args.edits``. The edits are passed to every callback that needs edits,
            unless the callback already has edits.
        train_dataset: the training data, used instead of the edits: an ``EditDataset``, or a dataset as for
            ``SFTTrainer``.
        callbacks: additional callbacks, from this package or others.
        kwargs: all other arguments of ``SFTTrainer``.

    Attributes:
        answer_end: whether targets end with end-of-text, with the reason for this decision. None if you pass a
            ``train_dataset`` that is not an ``EditDataset``.

    Raises:
        EditError: there is nothing to train on, or no callback is from this package.

    Example:
        >>> from kedit_train import EditSFTConfig, EditSFTTrainer, world
        >>> args = EditSFTConfig(
        ...     "runs/example",
        ...     edits="world",
        ...     max_steps=1,
        ...     use_cpu=True,
        ...     bf16=False,
        ...     report_to=[],
        ...     disable_tqdm=True,
        ...     parameter_scope={"layers": 0.7},
        ... )
        >>> trainer = EditSFTTrainer(str(world.path()), args=args)
        >>> [type(callback).__name__ for callback in args.edit_callbacks()]
        ['ParameterScope']
    """

    _tag_names = [*SFTTrainer._tag_names, "knowledge-editing", "kedit-train"]  # noqa: RUF012 (as in the parent)

    def __init__(
        self,
        model: Any,
        *,
        args: EditSFTConfig,
        edits: Sequence[Edit] | None = None,
        train_dataset: Any = None,
        callbacks: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        with reported_by("EditSFTTrainer"):
            if not isinstance(args, EditSFTConfig):
                raise EditError(f"args must be an EditSFTConfig, got {type(args).__name__}.")
            check_not_gated(model)
            if edits is None and args.edits is not None:
                edits = EditDataset.load(args.edits)
            if edits is None and train_dataset is None:
                raise EditError(
                    "edits or train_dataset must be set, got neither; pass edits= or train_dataset= to the trainer, or "
                    "set edits in args (in YAML, edits: FILE)."
                )
            examples: Any = edits if train_dataset is None else train_dataset
            own_edits: EditDataset | None = None
            if isinstance(examples, EditDataset) or train_dataset is None:
                own_edits = EditDataset.of(examples)
                # With thinking=True, _decide_end adds the thoughts, after TRL has loaded the model and the tokenizer.
                prompt_format = read_format(args.prompt_format)
                shown = replace(prompt_format, thinking=False) if thinks(prompt_format) else prompt_format
                examples = own_edits.to_prompt_completion(prompt_format=shown)
            all_callbacks = [*args.edit_callbacks(edits), *(callbacks or ())]
            own = [callback for callback in all_callbacks if isinstance(callback, EditCallback)]
            if not own:
                raise EditError(
                    "at least one callback of kedit_train must be set, got none (the run would be plain "
                    f"fine-tuning); in args, set at least one of {', '.join(CALLBACKS)}."
                )
        for callback in own:
            if edits is not None and getattr(callback, "edits", edits) is None:
                callback.edits = edits  # type: ignore[attr-defined]
        super().__init__(model, args=args, train_dataset=examples, callbacks=all_callbacks, **kwargs)
        with reported_by("EditSFTTrainer"):
            self.answer_end: EndDecision | None = None if own_edits is None else self._decide_end(own_edits)
        args.answer_end = self.answer_end  # type: ignore[misc]
        args.trained_edits = edits if own_edits is None else own_edits  # type: ignore[misc]

    def _decide_end(self, edits: EditDataset) -> EndDecision:
        """Decide whether targets end with end-of-text, and tokenize the training data again if necessary.

        The tokens of TRL are replaced in two cases:

        - Targets should not end with end-of-text. TRL always appends end-of-text.
        - The prompt format is a ``ChatFormat`` with ``thinking=True``. The tokens of TRL lack the empty block of
          thoughts between prompt and target, because TRL would include this block in the loss.
        """
        args: Any = self.args
        tokenizer, prompt_format = self.processing_class, read_format(args.prompt_format)
        decision = decide_together(
            _APPEND_EOS[args.append_eos], tokenizer, edits, model=self.model, prompt_format=prompt_format
        )
        if decision.append and not thinks(prompt_format):
            return decision
        if args.packing:
            raise EditError(
                "packing must be False if the targets do not end with end-of-text, or if prompt_format has "
                "thinking=True; set packing=False."
            )
        self.train_dataset: Any = edits.to_tokens(
            tokenizer, append_eos=decision.append, prompt_format=prompt_format, max_length=args.max_length
        )
        return decision

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write TRL's model card to ``args.output_dir``, and add a section on the edit."""
        super().create_model_card(model_name, dataset_name, tags)
        metrics, saved = self._edit_callback(EditMetrics), self._edit_callback(SaveDelta)
        report = getattr(metrics, "report", None)
        if report is None or not self.is_world_process_zero():
            return
        runtime = next((row["train_runtime"] for row in self.state.log_history if "train_runtime" in row), None)
        cost = (
            {} if runtime is None else {"training": f"{runtime:.1f} s on {self.args.device.type}, evaluations included"}
        )
        cost["evaluation before, during and after training"] = f"{report.meta['seconds_of_metrics']:.1f} s"
        text = card.model_card_section(report, delta=getattr(saved, "delta", None), cost=cost)
        card.insert_section(Path(str(self.args.output_dir)) / "README.md", text)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model together with its model card."""
        super().save_model(output_dir, _internal_call)
        if _internal_call or not self.is_world_process_zero():
            return
        run_folder = Path(str(self.args.output_dir))
        folder = run_folder if output_dir is None else Path(output_dir)
        self.create_model_card(model_name=folder.name)
        if folder.resolve() != run_folder.resolve():
            shutil.copyfile(run_folder / "README.md", folder / "README.md")

    def _edit_callback(self, callback_class: type[EditCallback]) -> Any | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, callback_class)), None)
