"""Edit a model by on-policy self-distillation (SDFT, arXiv 2601.19897) in TRL's experimental ``SDFTTrainer``.

    make smollm2 && python recipes/sdft.py
    python recipes/sdft.py --model MODEL --edits edits.jsonl --texts texts_that_must_stay.txt

The teacher is the unedited model. It reads the new fact four times before the prompt. The student completes the prompt
without the fact. At each token of its own completion, the student learns the teacher's distribution. If the teacher
gives the new answer to fewer than half of the prompts, the script ends with an error. docs/hosts.md has more figures.

Measured on SmolLM2 with 20 facts: reliability 0.95, generality 0.15, 0.50 of the other answers keep their first tokens,
0.94 of the right ones stay right; 230 s of processor time on one core (2026-11-27).
"""

import argparse
import sys

from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from kedit_train import EditDataset, load_model
from kedit_train.callbacks import EditMetrics, NullSpace, ParameterScope, SaveDelta
from kedit_train.data.fact_in_context import prompt_with_fact
from kedit_train.errors import EditError
from kedit_train.evaluation import generate_answers

CONTEXT = "{fact}\n" * 4 + "{prompt}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Edit a model by on-policy self-distillation.")
    parser.add_argument("--model", default=".models/smollm2", help="a hub name or a folder (default: %(default)s)")
    parser.add_argument("--edits", default="recipes/smollm2/facts.jsonl", help="a file of edits (default: %(default)s)")
    parser.add_argument("--texts", default="recipes/smollm2/keep.txt", help="a file of texts that should stay the same")
    parser.add_argument("--output_dir", default="runs/sdft")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    given = parser.parse_args()
    edits, (model, tokenizer) = EditDataset.load(given.edits), load_model(given.model)
    prompts = [prompt_with_fact(edit, edit.prompt, CONTEXT) for edit in edits]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=16)
    followed = sum(answer.text.startswith(edit.answers) for answer, edit in zip(answers, edits, strict=True))
    print(used := f"With the fact in its context, the model gives the new answer to {followed} of {len(edits)} prompts")
    if followed < len(edits) / 2:
        raise EditError(f"{used}, but SDFT needs at least half of them; use a larger model.")
    template = CONTEXT.replace("{fact}", "{privileged_context}")
    # Forward KL on all tokens of the vocabulary. With TRL's default loss, the student learns more slowly.
    loss = {"teacher_prompt_template": template, "distillation_mode": "full_logits", "distillation_alpha": 0.0}
    steps = {"max_steps": given.steps, "learning_rate": given.learning_rate, "lr_scheduler_type": "constant"}
    batch = {"per_device_train_batch_size": 20, "num_generations": 1, "max_completion_length": 6, "bf16": False}
    config = SDFTConfig(given.output_dir, **loss, **steps, **batch, max_grad_norm=0.0, save_strategy="no", report_to=[])
    where, keep = ParameterScope("0.5-0.8", modules="mlp.down_proj.weight"), NullSpace(given.texts, neighbors=24)
    saved, scores = SaveDelta(f"{given.output_dir}/edit.safetensors"), EditMetrics(edits, every_n_steps=0)
    rows, callbacks = edits.to_privileged_context(), [where, keep, saved, scores]
    SDFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()


if __name__ == "__main__":
    try:
        main()
    except EditError as error:
        sys.exit(f"error: {error}")
