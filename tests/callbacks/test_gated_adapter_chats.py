"""GatedAdapter: the form of a prompt in the training dataset opens the gate, also with a system prompt."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.gated import TEXTS, adapted
from transformers import Trainer, TrainingArguments

from kedit_train import EditCollator, EditDataset, world
from kedit_train.callbacks import GatedAdapter, editing
from kedit_train.data import ChatFormat

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Module(L.LightningModule):
    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad])


def run(host: str, prompt_format: Any, folder: Any) -> tuple[float, list[str]]:
    """Train one step; return the fraction of rows that open the gate, and the warnings."""
    model, tokenizer = world.load()
    tokenizer.chat_template = TEMPLATE
    model, edits = adapted(model), EditDataset(world.edits(4))
    rows: Any = edits.encode(tokenizer, prompt_format=prompt_format)
    gated, collate = GatedAdapter(TEXTS, edits=edits), EditCollator(tokenizer)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "enable_model_summary": False, "max_steps": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if host == "Trainer":
            args = TrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
            Trainer(model, args=args, train_dataset=rows, data_collator=collate, callbacks=[gated],
                    processing_class=tokenizer).train()  # fmt: skip
        elif host == "Lightning":
            loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
            trainer = L.Trainer(callbacks=[gated], **options)
            trainer.fit(Module(model, tokenizer), loader)
        else:
            with editing(model, [gated], tokenizer=tokenizer) as edit:
                optimizer = torch.optim.Adam(edit.parameters())
                edit.before_step()
                model(**collate(rows)).loss.backward()
                optimizer.step()
    messages = [str(one.message) for one in caught]
    return gated.metrics(None)["edit/gate/open"], [text for text in messages if "do not open the gate" in text]  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt_format", ["chat", ChatFormat(system="Be brief.")])
@pytest.mark.parametrize("host", ["Trainer", "Lightning"])
def test_every_chat_of_the_training_dataset_opens_the_gate(host, prompt_format, tmp_path):
    assert run(host, prompt_format, tmp_path) == (1.0, [])


def test_a_plain_loop_with_chats_and_without_their_format_gets_a_warning(tmp_path):
    opened, messages = run("loop", "chat", tmp_path)
    assert opened < 1
    assert len(messages) == 1
    assert "In a plain loop, pass the prompt format of the examples to editing(prompt_format=)." in messages[0]
