"""A model whose answers are written in the test, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

SHARPNESS = 10.0
END, PAD = 256, 257
VOCAB = 258


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte: ids 0 to 255 are the bytes, then </s> and <pad>."""
    alphabet = {symbol: at for at, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (END, PAD, VOCAB)
    return tokenizer


class ScriptedConfig(PretrainedConfig):
    model_type = "scripted_model"

    def __init__(self, max_position_embeddings: int = 200, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = VOCAB, 8, 1, 1
        self.max_position_embeddings = max_position_embeddings


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """Generates ``answers[prompt]``.

    At the k-th position after the prompt, the model ranks the k-th token of the answer first, whatever tokens it has
    read after the prompt. After the answer, it ranks end-of-text first. Answers in ``endless`` start again instead of
    ending.
    """

    config_class = ScriptedConfig

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__(config)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.script: list[tuple[list[int], list[int], bool]] = []
        self.calls = 0
        self.nan = False

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict:  # type: ignore[override]
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def choice(self, prefix: list[int]) -> int:
        for prompt, answer, endless in self.script:
            if prefix[: len(prompt)] == prompt:
                k = len(prefix) - len(prompt)
                return answer[k % len(answer)] if endless else answer[k] if k < len(answer) else END
        return END

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        self.calls += 1
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row, (ids, kept) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
            prefix = []
            for at, (token, keep) in enumerate(zip(ids, kept, strict=True)):
                prefix += [token] if keep else []
                logits[row, at, self.choice(prefix)] = SHARPNESS
        return CausalLMOutput(logits=logits * (float("nan") if self.nan else 1.0) + self.anchor)  # type: ignore[arg-type]


@pytest.fixture
def scripted_model() -> Callable[..., tuple[ScriptedModel, PreTrainedTokenizerFast]]:
    """``scripted_model({prompt: answer}, endless={prompt: answer}, context=200) -> (model, tokenizer)``."""

    def make(answers: dict[str, str], endless: dict[str, str] | None = None, context: int = 200) -> Any:
        tokenizer = byte_tokenizer()
        model = ScriptedModel(ScriptedConfig(context))
        model.generation_config.eos_token_id = END

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        lines = [(p, a, False) for p, a in answers.items()] + [(p, a, True) for p, a in (endless or {}).items()]
        # The longest prompt comes first, because a prompt may be the beginning of another prompt.
        model.script = [(ids(p), ids(a), e) for p, a, e in sorted(lines, key=lambda line: -len(line[0]))]
        return model, tokenizer

    return make
