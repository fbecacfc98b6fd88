"""Check that the teacher of a distillation trainer of TRL has the vocabulary of the model that is trained."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from kedit_train.errors import EditError


def check_teacher_vocabulary(trainer: Any) -> None:
    """Raise an error if the trainer's teacher has another vocabulary than the trained model.

    A distillation loss compares the probabilities that the two models give to each token id. Therefore each id must
    stand for the same token in both models. This function first compares the sizes of the two vocabularies, then the
    tokenizers of the teacher and the trainer. If the teacher's tokenizer is not stored on this computer, only the sizes
    are compared.

    Args:
        trainer: any trainer. Only trainers of TRL with a ``teacher_model`` are checked. Other trainers may have a loss
            that does not compare token ids. TRL's GOLD trainer with ``use_uld_loss=True`` is not checked, because it
            accepts any teacher.

    Raises:
        EditError: the vocabularies differ.
    """
    model: Any = trainer.model
    teacher: Any = getattr(trainer, "teacher_model", None)
    # DDP wraps the teacher.
    teacher = getattr(teacher, "module", teacher)
    is_trl = any(base.__module__.startswith("trl.") for base in type(trainer).__mro__)
    if not is_trl or teacher is None or teacher is model:
        return
    if getattr(trainer.args, "use_uld_loss", False):
        return
    given, expected = (one.config.get_text_config().vocab_size for one in (teacher, model))
    if given != expected:
        raise EditError(
            f"the teacher must have the vocabulary of the trained model ({expected} tokens), got {given} tokens; use a "
            "teacher with the same tokenizer.",
            component=type(trainer).__name__,
        )
    path = teacher.config.name_or_path
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if not path or path == model.config.name_or_path or not hasattr(tokenizer, "get_vocab"):
        return
    try:
        own = AutoTokenizer.from_pretrained(path, local_files_only=True).get_vocab()
    except Exception:  # The teacher was saved without a tokenizer, or needs code that was not loaded.
        return
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    # One of the tokenizers may have additional tokens, such as a padding token.
    different = [token for token, number in own.items() if tokens.get(number, token) != token]
    if different:
        raise EditError(
            f"the teacher {path!r} must have the tokenizer of the trained model, but their tokenizers differ, for "
            f"example in the token {different[0]!r}; use a teacher with the same tokenizer.",
            component=type(trainer).__name__,
        )
