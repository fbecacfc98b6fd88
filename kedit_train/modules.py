"""A LightningModule around any causal language model and a LightningDataModule around any file of edits.

The model and the edits are all that is here: what makes the run an edit are the callbacks in ``L.Trainer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from kedit_train.data import EditDataset
from kedit_train.data.buckets import LengthBuckets
from kedit_train.data.tokenise import Encoded, collate, context_length, pad_token_id
from kedit_train.errors import EditError

WORLD = "world"


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
        save_to: a folder for the edited model and its tokenizer, written when training ends.

    Attributes:
        model: the ``transformers`` model, in training mode.
        tokenizer: its tokenizer.

    Raises:
        EditError: there is no such model, it is no causal language model, or it has no tokenizer.
    """

    def __init__(
        self,
        name: str = WORLD,
        learning_rate: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.save_to = name, save_to
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        # Here and not in configure_model: callbacks choose parameters in their setup, which comes before that hook.
        self.model, self.tokenizer = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
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
            print(f"edited model: {self.save_to}")


class EditDataModule(LightningDataModule):
    """Give the edits to a LightningModule as batches of ``input_ids``, ``attention_mask`` and ``labels``.

    Breadth-first: all edits are shuffled in every epoch (arXiv 2509.22072). Targets only are labelled, by position.

    Args:
        path: a file that ``EditDataset.load`` reads, or "world" for edits of the embedded world.
        limit: the most records to read.
        batch_size: edits a step, on each process.
        shuffle: draw the edits in a new order in every epoch.
        bucket: with shuffle, put edits of like length together, so that little of a batch is padding; every epoch mixes
            them anew.
        append_eos: end every target with end-of-text, so that the edited model learns to stop.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and says how many.
        texts: a file of texts that the edit has to leave alone; it takes the place of ``texts: world`` in the
            ``KLLocality`` of a recipe (read by ``python -m kedit_train fit``).
        num_workers: of the data loader; the batches are in memory, so 0 is fastest.

    Attributes:
        edits: an ``EditDataset``, there from the beginning.

    Raises:
        EditError: the file cannot be read, a record is bad, or an edit does not fit into the model's context.
    """

    def __init__(
        self,
        path: str = WORLD,
        limit: int | None = None,
        batch_size: int = 100,
        shuffle: bool = True,
        bucket: bool = True,
        append_eos: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        texts: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise EditError(f"EditDataModule: batch_size={batch_size} is no number of edits (1 or more)")
        self.path, self.batch_size, self.shuffle, self.append_eos = path, batch_size, shuffle, append_eos
        self.bucket, self.texts, self.num_workers = bucket, texts, num_workers
        self.edits = EditDataset.load(path, limit=limit, on_error=on_error)

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
        self._encoded = self.edits.encode(self.tokenizer, append_eos=self.append_eos, max_length=limit)

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


def load_model(name: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a hub name, a folder or "world".

    Raises:
        EditError: either is not there, the model is no causal language model, or some of its weights are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == WORLD:
        from kedit_train import world

        name = str(world.path())
    with refusals(name, "cannot be loaded as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    model, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise EditError(
            f"model {name!r} has no weights for {missing}, so {type(model).__name__} would start from random ones: "
            "give the checkpoint of a causal language model"
        )
    if not is_causal(model):
        raise EditError(
            f"model {name!r} ({type(model).__name__}) lets a token see those after it, so it cannot be asked to "
            "continue a prompt: give the checkpoint of a causal language model"
        )
    with refusals(name, "comes without a tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return model, tokenizer


@contextmanager
def refusals(name: str, problem: str) -> Iterator[None]:
    """Turn what ``transformers`` says over many lines into one: the first names the reason."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        local = "" if Path(name).is_dir() else " (there is no such folder here)"
        raise EditError(
            f"model {name!r}{local} {problem}: {reason[:300]}; give a hub name, a folder saved by save_pretrained, or "
            "'world'"
        ) from error


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Whether the answers at the first positions stay when the last token of the input is another one.

    ``AutoModelForCausalLM`` loads encoders too, and configurations do not tell (``is_decoder`` is False for GPT-NeoX).
    """
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    logits = model.eval()(input_ids=ids).logits.float()
    change = (logits[0] - logits[1]).norm(dim=-1)
    if bool(change.isnan().any()):
        raise EditError(
            f"{type(model).__name__} gives NaN logits: its weights have diverged; give a checkpoint from before that, "
            "or load it in a wider dtype"
        )
    return bool(change[:-1].max() <= torch.finfo(model.dtype).eps ** 0.5 * change[-1])
