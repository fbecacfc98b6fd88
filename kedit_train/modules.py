"""A LightningModule around any causal language model and a LightningDataModule around any file of edits.

The model and the edits are all that is here: what makes the run an edit are the callbacks in ``L.Trainer``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from kedit_train import world
from kedit_train.augmentation import augmentation
from kedit_train.data import Edit, EditDataset
from kedit_train.data.length_buckets import LengthBuckets
from kedit_train.data.prompts import PromptFormat, check_format
from kedit_train.data.tokenization import Encoded, collate, context_length, pad_token_id
from kedit_train.errors import EditError
from kedit_train.pretrained import load_model, lora_config, refused

# Edits of the embedded world where nobody says how many: a run of half a minute.
OF_THE_WORLD = 24


def check_rate(learning_rate: float) -> None:
    """Refuse what no optimizer takes, before a large model is loaded."""
    if not 0.0 <= learning_rate < float("inf"):
        raise EditError(f"model.learning_rate={learning_rate} is no rate: give 0 or more")


class EditModule(LightningModule):
    """Fine-tune a causal language model with Adam at a constant learning rate.

    Its defaults are those of LocFT-BF ("Fine-tuning Done Right in Model Editing", arXiv 2509.22072): Adam without
    weight decay, warm-up or schedule, in full precision.

    Args:
        name: a hub name, a local folder, or "world" for the embedded model.
        learning_rate: of Adam; constant.
        betas: of Adam.
        weight_decay: of Adam (an L2 term in the gradient, not AdamW's).
        dtype: what the weights are loaded in. In half precision, updates below about 1/256 of a weight are rounded
            away. "auto" takes the checkpoint's own.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        trust_remote_code: let the checkpoint bring its own code.
        save_to: a folder for the edited model (with ``lora`` its adapter) and its tokenizer, written when training
            ends.
        lora: train an adapter instead: arguments of peft's ``LoraConfig``, such as
            ``{r: 8, lora_alpha: 32, target_modules: [q_proj, v_proj]}``. ``ParameterScope`` then restricts which of its
            factors train, by the names of the modules that they adapt.
        chat_template: a Jinja template for a tokenizer that comes without one (or with another), for
            ``prompt_format="chat"``.

    Attributes:
        model: the ``transformers`` model, in training mode; with ``lora`` a ``PeftModel`` around it.
        tokenizer: its tokenizer.

    Raises:
        EditError: there is no such model, it is no causal language model, or it has no tokenizer.
    """

    def __init__(
        self,
        name: str = world.NAME,
        learning_rate: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        save_to: str | None = None,
        lora: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__()
        # Before a large model is loaded.
        check_rate(learning_rate)
        adapter = None if lora is None else lora_config(lora)
        self.name, self.save_to = name, save_to
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        # Here and not in configure_model: callbacks choose parameters in their setup, which comes before that hook.
        self.model, self.tokenizer = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        if adapter is not None:
            from peft import get_peft_model

            with refused(f"lora={lora}"):
                self.model = get_peft_model(self.model, adapter)
        # from_pretrained leaves evaluation mode, which Lightning keeps.
        self.model.train()
        if gradient_checkpointing:
            # The reentrant kind needs inputs that require gradients, which a frozen embedding does not give.
            newer = getattr(self.model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
            (newer or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output for ``input_ids``, ``attention_mask`` and ``labels``, each [batch, length]."""
        return self.model(**batch, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss (a scalar), or what ``TokenSmoothing`` puts in its place."""
        loss = self(**batch).loss
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the parameters that require a gradient. ``--optimizer`` on the command line takes its place."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)

    def on_fit_start(self) -> None:
        """Refuse now what ``save_to`` could not do at the end."""
        if self.save_to is not None and any(hasattr(p, "device_mesh") for p in self.parameters()):
            raise EditError("save_to cannot write a model that is sharded over processes; use Lightning's checkpoints")

    def on_train_end(self) -> None:
        """Save the edited model; the callbacks have left it by now."""
        if self.save_to is not None and self.trainer.is_global_zero:
            self.model.save_pretrained(self.save_to)
            self.tokenizer.save_pretrained(self.save_to)
            print(f"{'adapter' if hasattr(self.model, 'peft_config') else 'edited model'}: {self.save_to}")


class EditDataModule(LightningDataModule):
    """Give the edits to a LightningModule as batches of ``input_ids``, ``attention_mask`` and ``labels``.

    Breadth-first: all edits are shuffled in every epoch (arXiv 2509.22072). Targets only are labelled, by position.

    Args:
        path: a file that ``EditDataset.load`` reads, or "world" for edits of the embedded world.
        limit: the most records to read; by default all of a file, and 24 of the world.
        batch_size: edits a step, on each process.
        shuffle: draw the edits in a new order in every epoch.
        bucket: with shuffle, put edits of like length together, so that little of a batch is padding; every epoch mixes
            them anew.
        append_eos: end every target with end-of-text, so that the edited model learns to stop.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and says how many.
        texts: a file of texts that the edit has to leave alone; it takes the place of ``texts: world`` in the
            ``KLLocality`` of a recipe (read by ``python -m kedit_train fit``).
        num_workers: of the data loader; the batches are in memory, so 0 is fastest.
        prompt_format: in which form the edits are trained: as they stand ("plain"), through the tokenizer's template as
            a "chat", or framed as a "question". ``EditMetrics`` has the same argument.
        answers: "new" trains each edit's target; "old" its ``old_target``, as what is to be forgotten by task
            arithmetic; what is asked stays the same.
        prefixes: train every edit also behind so many short texts that the unedited model makes up, for generality
            (arXiv 2402.11078); never its rephrases.
        replay: train also the unedited model's own answers to these prompts, for locality: a ``.txt`` file with one a
            line, a file of edits (its prompts alone), or "world". What edits are scored on or about is left out; a line
            says how much.
        replay_rows: how many of them, drawn anew under each seed; by default as many as there are edits.
        earlier: a file of edits that the model has learned before: all are trained again, with their own targets.

    What ``prefixes``, ``replay`` and ``earlier`` add is made once a run, before the first step and under the seed of
    torch (``seed_everything``), and is the same on every process.

    Attributes:
        edits: an ``EditDataset``, there from the beginning.
        extra: the rows beside them, after ``setup``.

    Raises:
        EditError: the file cannot be read, a record is bad, an edit does not fit into the model's context, one has no
            ``old_target`` where that is to be trained, or nothing is left to replay.
    """

    def __init__(
        self,
        path: str = world.NAME,
        limit: int | None = None,
        batch_size: int = 100,
        shuffle: bool = True,
        bucket: bool = True,
        append_eos: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        texts: str | None = None,
        num_workers: int = 0,
        prompt_format: PromptFormat = "plain",
        answers: Literal["new", "old"] = "new",
        prefixes: int = 0,
        replay: str | None = None,
        replay_rows: int | None = None,
        earlier: str | None = None,
    ) -> None:
        super().__init__()
        check_format(prompt_format)
        if answers not in ("new", "old"):
            raise EditError(f"EditDataModule: answers={answers!r} is not known: use 'new' or 'old'")
        if batch_size < 1:
            raise EditError(f"EditDataModule: batch_size={batch_size} is no number of edits (1 or more)")
        self.path, self.batch_size, self.shuffle, self.append_eos = path, batch_size, shuffle, append_eos
        self.bucket, self.texts, self.num_workers = bucket, texts, num_workers
        self.prompt_format: PromptFormat = prompt_format
        self.beside: dict[str, Any] = {
            "prefixes": prefixes,
            "replay": replay,
            "replay_rows": replay_rows,
            "earlier": earlier,
        }
        limit = OF_THE_WORLD if limit is None and world.is_world(path) else limit
        self.edits = EditDataset.load(path, limit=limit, on_error=on_error)
        self.taught = self.edits if answers == "new" else self.edits.to_old_targets()
        self.extra: list[Edit] = []

    def setup(self, stage: str) -> None:
        """Tokenise with the tokenizer of the module that is trained."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        self.tokenizer = getattr(module, "tokenizer", None)
        if self.tokenizer is None:
            raise EditError(
                f"EditDataModule tokenises with the module's tokenizer, and {type(module).__name__} has no attribute "
                "'tokenizer'; set it in its __init__, or use EditModule"
            )
        limit = context_length(module.model.config) if hasattr(getattr(module, "model", None), "config") else None
        self._pad_id = pad_token_id(self.tokenizer)
        if stage == "fit":
            self.extra = self._made(module) if any(self.beside.values()) else []
        rows = EditDataset([*self.taught, *self.extra], name=self.edits.name)
        form: Any = {"append_eos": self.append_eos, "prompt_format": self.prompt_format}
        self._encoded = rows.encode(self.tokenizer, max_length=limit, **form)

    def _made(self, module: Any) -> list[Edit]:
        """The rows beside the edits, of a model that is still the unedited one (a checkpoint is restored later)."""
        if not isinstance(getattr(module, "model", None), torch.nn.Module):
            raise EditError(
                f"EditDataModule asks the module's model for prefixes and replay, and {type(module).__name__} has no "
                "attribute 'model'; set it in its __init__, or use EditModule"
            )
        strategy: Any = self.trainer.strategy if self.trainer is not None else None
        if type(strategy) in (SingleDeviceStrategy, DDPStrategy):
            # Where it is about to go anyway; strategies that shard it might not have the room.
            module.to(strategy.root_device)
        made = augmentation(
            module.model,
            self.tokenizer,
            self.edits,
            seed=torch.initial_seed(),
            prompt_format=self.prompt_format,
            **self.beside,
        )
        if self.trainer is not None and self.trainer.is_global_zero:
            print(made.line)
        # Rounding may differ between processes, and one that had other rows would have other steps.
        return strategy.broadcast(made(self.taught))

    def train_dataloader(self) -> DataLoader[Encoded]:
        """Batches of padded edits; Lightning deals them out over processes."""
        encoded: Any = self._encoded
        rest: dict[str, Any] = {"num_workers": self.num_workers, "collate_fn": self._collate}
        if not (self.bucket and self.shuffle):
            return DataLoader(encoded, batch_size=self.batch_size, shuffle=self.shuffle, **rest)
        lengths = [len(row.input_ids) for row in self._encoded]
        buckets = LengthBuckets(RandomSampler(encoded), self.batch_size, False, lengths)
        return DataLoader(encoded, batch_sampler=buckets, **rest)

    def _collate(self, rows: list[Encoded]) -> dict[str, Tensor]:
        return collate(rows, pad_id=self._pad_id)
