"""A GGUF file loads as an ordinary model, and can be saved as safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_train import load_model, world
from kedit_train.errors import EditError
from kedit_train.gguf_file import load_gguf

gguf = pytest.importorskip("gguf")

# The name in transformers -> the name in a GGUF file, for one layer.
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a query or key matrix in the order of llama.cpp, which pairs the two halves of each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a GGUF file in fp32, with a small vocabulary of its own as the tokenizer."""
    model, _ = world.load()
    config = model.config
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"<{i}>" for i in range(3, config.vocab_size))])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(config.eos_token_id)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", state["lm_head.weight"])
    for i in range(config.num_hidden_layers):
        for name, short in LAYER.items():
            value = state[f"model.layers.{i}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                value = permuted(value, heads)
            writer.add_tensor(f"blk.{i}.{short}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_has_the_weights_of_the_model_and_can_be_saved(file: Path, tmp_path: Path) -> None:
    original, _ = world.load()
    model, _ = load_model(str(file))
    for (name, before), after in zip(original.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after), name
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.state_dict()["model.norm.weight"], original.state_dict()["model.norm.weight"])
    assert not hasattr(saved.config, "quantization_config")


def test_a_missing_or_damaged_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="is not a file"):
        load_gguf(tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(EditError) as error:
        load_model(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_real_model_completes_a_sentence() -> None:
    from real_models import smollm2

    model, tokenizer = load_model(str(smollm2()))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris")
    assert isinstance(tokenizer, type(AutoTokenizer.from_pretrained(str(smollm2()))))
