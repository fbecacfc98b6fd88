"""A LightningModule for a causal language model and a LightningDataModule for a file of edits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from kedit_train import world
from kedit_train.arguments import at_least, check_arguments, integer_from, optional
from kedit_train.augmentation import AugmentationOptions, augmentation
from kedit_train.core.answer_end import decide_together
from kedit_train.core.gate.adapter_folder import remove_stale_gate
from kedit_train.core.gate.adapter_source import check_not_gated
from kedit_train.data import Edit, EditCollator, EditDataset, split_documents
from kedit_train.data.answer_end import APPEND_EOS, AppendEos, EndDecision
from kedit_train.data.chat_format import PROMPT_FORMAT, PromptFormat, read_format
from kedit_train.data.dataset import LIMIT
from kedit_train.data.epoch_sampler import EpochSampler
from kedit_train.data.length_buckets import LengthBuckets
from kedit_train.data.readers.documents import DOCUMENTS
from kedit_train.data.tokenization import Encoded, context_length
from kedit_train.errors import EditError
from kedit_train.optional import require
from kedit_train.paths import PATH
from kedit_train.pretrained import check_new_adapter, load_model, lora_config, peft_errors

_NO_AUGMENTATION = AugmentationOptions()


class EditModule(LightningModule):
    """A causal language model that is fine-tuned with Adam at a constant learning rate.

    The defaults follow LocFT-BF, the method of the paper below: Adam in full precision, without weight decay, warm-up
    or a schedule. This module does plain fine-tuning. The callbacks of the ``Trainer`` turn the fine-tuning into an
    edit. In a LightningCLI project, ``--optimizer`` and ``--lr_scheduler`` replace Adam and the constant learning rate.

    Args:
        name: a model name on the Hugging Face Hub, the folder of a saved model, or "world" for the bundled model.
        learning_rate: the learning rate of Adam, 0 or more.
        dtype: the dtype of the weights. "auto" keeps the dtype of the saved weights. In bfloat16, rounding removes
            every update that is smaller than about 1/256 of the weight.
        gradient_checkpointing: whether to recompute the activations in the backward pass, which saves memory and costs
            time.
        trust_remote_code: whether to run Python code that comes with the model.
        save_path: a folder in which the edited model and its tokenizer are saved when training ends. With ``lora``, the
            adapter is saved instead of the model. None: nothing is saved.
        lora: arguments of PEFT's ``LoraConfig``, such as
            ``{"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}``. If ``lora`` is set, a LoRA adapter
            is trained. ``ParameterScope`` then selects the LoRA factors of a module by the name of the module, such as
            ``q_proj``. None: no adapter.
        chat_template: a Jinja chat template for the tokenizer. ``EditDataModule(prompt_format="chat")`` uses it. None:
            the tokenizer keeps its own template.

    Attributes:
        model: the ``transformers`` model in training mode. With ``lora``, a ``PeftModel`` around this model.
        tokenizer: the model's tokenizer.

    Raises:
        EditError: the model or its tokenizer cannot be loaded, or the model is not a causal language model.

    References:
        "Fine-tuning Done Right in Model Editing", arXiv 2509.22072.

    Example:
        >>> import lightning as L
        >>> from kedit_train.callbacks import ParameterScope
        >>> from kedit_train.modules import EditDataModule, EditModule
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[ParameterScope(0.7)], enable_model_summary=False, **quiet)
        >>> trainer.fit(EditModule("world"), EditDataModule("world", limit=4, batch_size=4))
        >>> trainer.global_step
        1
    """

    def __init__(
        self,
        name: str = world.NAME,
        *,
        learning_rate: float = 5e-4,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        save_path: str | None = None,
        lora: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__()
        # The arguments are checked before a large model is loaded.
        check_model(learning_rate=learning_rate, save_path=save_path)
        adapter = None if lora is None else lora_config(lora)
        check_not_gated(name)
        self.name = name
        self.save_path = save_path
        self.learning_rate = learning_rate
        # The model is loaded here and not in configure_model, because the setup of the callbacks runs before
        # configure_model and selects parameters.
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        if adapter is not None:
            check_new_adapter(self.model, name)
            with require("peft"):
                from peft import get_peft_model
            with peft_errors(f"lora={lora}"):
                self.model = get_peft_model(self.model, adapter)
        # transformers loads models in evaluation mode, and Lightning keeps this mode.
        self.model.train()
        if gradient_checkpointing:
            # Reentrant checkpointing needs inputs that require gradients, which a frozen embedding does not return.
            # activation_checkpointing_enable is the name of the method since transformers 5.23.
            newer = getattr(self.model, "activation_checkpointing_enable", None)
            (newer or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the model for ``input_ids``, ``attention_mask`` and ``labels``, each [batch, length]."""
        return self.model(**batch, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the scalar loss from the model's output. A callback can replace this loss."""
        loss = self(**batch).loss
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for the parameters that require a gradient."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=self.learning_rate)

    def on_fit_start(self) -> None:
        """Raise an error before the first step if the model cannot be saved at ``save_path``."""
        if self.save_path is not None and any(hasattr(p, "device_mesh") for p in self.parameters()):
            raise EditError(
                "save_path must be None for a model that is sharded over processes; save the model with Lightning's "
                "checkpoints.",
                component="EditModule",
            )
        if self.save_path is not None and self.trainer.is_global_zero:
            try:
                Path(self.save_path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EditError(
                    f"save_path={self.save_path!r} cannot be created ({error.strerror}); choose another folder.",
                    component="EditModule",
                ) from error

    def on_train_end(self) -> None:
        """Save the edited model, after the callbacks have removed their hooks from it."""
        if self.save_path is not None and self.trainer.is_global_zero:
            self.model.save_pretrained(self.save_path)
            remove_stale_gate(self.model, self.save_path)
            self.tokenizer.save_pretrained(self.save_path)
            print(f"{'adapter' if hasattr(self.model, 'peft_config') else 'edited model'}: {self.save_path}")


class EditDataModule(LightningDataModule):
    """Batches of edits with ``input_ids``, ``attention_mask`` and ``labels``, made by the trained module's tokenizer.

    All edits are shuffled in every epoch (breadth-first training, arXiv 2509.22072). In epochs with many batches, edits
    of similar length are put into the same batch, to reduce padding. Only the tokens of the targets count in the loss.

    Args:
        path: a file or a folder of documents that :meth:`EditDataset.load` reads, or "world" for the bundled edits.
            Documents that are longer than the model's context are split.
        limit: maximum number of records to read. None: all records of a file, or all 24 bundled edits.
        on_error: "raise" stops at the first bad record, and "skip" leaves out bad records with a warning.
        batch_size: training examples per step on each process.
        append_eos: whether every target ends with the end-of-text token, so that the edited model learns to stop. With
            "auto", ``prompt_format`` decides. If it is not "plain", targets end with the token. If it is "plain",
            targets end with the token only if the unedited model ends its completions by itself. To decide this, the
            model is tested on a few edits. The decision is printed.
        prompt_format: the format of the prompts: as they are ("plain"), through the tokenizer's chat template
            ("chat"), framed as a question ("question"), or a :class:`~kedit_train.ChatFormat`.
        texts: a file of texts on which predictions should not change. In a recipe (``python -m kedit_train fit``), the
            file replaces ``texts: world`` in the callbacks. In a script, this argument has no effect: pass the texts
            to the callbacks instead.
        augmentation: options that add training examples (pseudo-paraphrases, replayed facts, previous edits) or rewrite
            targets. The examples are made once, before the first step. The random choices use torch's seed, which
            ``seed_everything`` sets. Every process gets the same examples.

    Attributes:
        edits: the edits as an :class:`EditDataset`.
        added: the examples that ``augmentation`` added. The list is filled in ``setup``.
        answer_end: whether targets end with end-of-text, and why. It is set in ``setup``.

    Raises:
        EditError: the file cannot be read, two edits contradict each other, an edit is longer than the model's context,
            or ``augmentation`` finds no fact that can be replayed.

    Example:
        >>> from kedit_train.modules import EditDataModule
        >>> data = EditDataModule("world", limit=4, batch_size=2)
        >>> len(data.edits)
        4
    """

    def __init__(
        self,
        path: str = world.NAME,
        *,
        limit: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        batch_size: int = 100,
        append_eos: AppendEos = "auto",
        prompt_format: PromptFormat = "plain",
        texts: str | None = None,
        augmentation: AugmentationOptions = _NO_AUGMENTATION,
    ) -> None:
        super().__init__()
        prompt_format = check_data(batch_size=batch_size, append_eos=append_eos, prompt_format=prompt_format)
        self.path = path
        self.batch_size = batch_size
        self.texts = texts
        self.append_eos: AppendEos = append_eos
        self.answer_end: EndDecision | None = None
        self.prompt_format: PromptFormat = prompt_format
        # A configuration file gives a mapping.
        self.augmentation: AugmentationOptions = (
            AugmentationOptions(**augmentation) if isinstance(augmentation, Mapping) else augmentation
        )
        self.edits: EditDataset = EditDataset.load(path, limit=limit, on_error=on_error)
        # The same check runs when the edits are tokenized. The early check here saves the time to load a large model.
        self.edits.check_trained_together()
        self.added: list[Edit] = []
        # The edits as they are trained. augmentation may rewrite their targets.
        self._trained = list(self.edits)

    def setup(self, stage: str) -> None:
        """Tokenize the edits with the tokenizer of the trained module, and make the additional examples."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        self.tokenizer: Any | None = getattr(module, "tokenizer", None)
        if self.tokenizer is None:
            raise EditError(
                f"the module must have an attribute 'tokenizer' to tokenize the edits, but {type(module).__name__} has "
                f"no such attribute; set self.tokenizer in {type(module).__name__}.__init__, or use EditModule.",
                component="EditDataModule",
            )
        longest = context_length(module.model.config) if hasattr(getattr(module, "model", None), "config") else None
        if self.edits.format == DOCUMENTS.name:
            parts = split_documents(self.edits, self.tokenizer, longest, prompt_format=self.prompt_format)
            if parts is not self.edits:
                self.edits, self._trained = parts, list(parts)
        if stage == "fit" and self.augmentation != _NO_AUGMENTATION:
            examples = self._augment(module)
            self._trained, self.added = examples[: len(self.edits)], examples[len(self.edits) :]
        if self.answer_end is None:
            self.answer_end = self._decide_end(module)
        self._encoded = EditDataset([*self._trained, *self.added], name=self.edits.name).encode(
            self.tokenizer,
            max_length=longest,
            append_eos=self.answer_end.append,
            prompt_format=self.prompt_format,
        )

    def _decide_end(self, module: Any) -> EndDecision:
        """Decide whether targets end with the end-of-text token."""
        model = getattr(module, "model", None)
        model = model if isinstance(model, torch.nn.Module) else None
        self._move(module)
        return decide_together(
            self.append_eos, self.tokenizer, self.edits, model=model, prompt_format=self.prompt_format
        )

    def _move(self, module: Any) -> Any:
        """Return the trainer's strategy, and move the model to the device, unless the strategy may shard the model."""
        strategy: Any = self.trainer.strategy if self.trainer is not None else None
        if type(strategy) in (SingleDeviceStrategy, DDPStrategy):
            # These strategies move the full model to the device anyway. Under a strategy that shards the model, the
            # full model may not fit into the memory of the device.
            module.to(strategy.root_device)
        return strategy

    def _augment(self, module: Any) -> list[Edit]:
        """Return the edits, followed by the additional examples. The targets of the edits may be rewritten.

        The unedited model generates the additional examples. This also holds for a resumed run, because Lightning
        restores the checkpoint only after ``setup``.
        """
        if not isinstance(getattr(module, "model", None), torch.nn.Module):
            raise EditError(
                f"augmentation needs a language model, but {type(module).__name__}.model is not a torch.nn.Module; set "
                f"self.model in {type(module).__name__}.__init__, or use EditModule.",
                component="EditDataModule",
            )
        strategy = self._move(module)
        augment = augmentation(
            module.model,
            self.tokenizer,
            self.edits,
            seed=torch.initial_seed(),
            prompt_format=self.prompt_format,
            **vars(self.augmentation),
        )
        if self.trainer is not None and self.trainer.is_global_zero:
            print(augment.summary)
        # All processes get the examples of one process. Rounding may differ between processes, and processes with
        # different examples could have different numbers of steps.
        return strategy.broadcast(augment.training_edits(self.edits))

    def train_dataloader(self) -> DataLoader[Encoded]:
        """Return a data loader of padded batches. Lightning distributes the batches over the processes."""
        examples: Any = self._encoded
        lengths = [len(example.input_ids) for example in self._encoded]
        # There are no worker processes, because the examples are already in memory and workers would only cost time.
        return DataLoader(
            examples,
            batch_sampler=LengthBuckets(EpochSampler(examples), self.batch_size, False, lengths),
            collate_fn=EditCollator(self.tokenizer),
        )


def check_model(*, learning_rate: Any, save_path: Any = None, **_: Any) -> None:
    """Check ``learning_rate`` and ``save_path`` of ``EditModule``. All other arguments are accepted unchecked."""
    check_arguments("EditModule", learning_rate=(learning_rate, at_least(0)), save_path=(save_path, optional(PATH)))


def check_data(
    *, batch_size: Any, append_eos: Any, prompt_format: Any, limit: Any = None, augmentation: Any = None, **_: Any
) -> PromptFormat:
    """Check the arguments of ``EditDataModule``. ``path``, ``on_error`` and ``texts`` are accepted unchecked.

    Returns:
        The prompt format. A mapping is converted to a ``ChatFormat``.
    """
    prompt_format = read_format(prompt_format)
    check_arguments(
        "EditDataModule",
        batch_size=(batch_size, integer_from(1)),
        append_eos=(append_eos, APPEND_EOS),
        prompt_format=(prompt_format, PROMPT_FORMAT),
        limit=(limit, LIMIT),
    )
    if isinstance(augmentation, Mapping):
        AugmentationOptions(**augmentation)
    return prompt_format
