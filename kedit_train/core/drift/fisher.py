"""Compute gradients and diagonal Fisher information of the weights in the scope, on the model before the edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from kedit_train.core.fsdp import gathered_parameters, shard_like
from kedit_train.core.output_head import evaluation_mode
from kedit_train.core.run import EditRun
from kedit_train.data.tokenization import Encoded
from kedit_train.errors import EditError
from kedit_train.functional.precision import wide

# A function that receives logits [T, V] and the token ids of the text [T], and returns labels [T].
LabelRule = Callable[[Tensor, Tensor], Tensor]


def mean_gradient(run: EditRun, examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Compute the gradient of the mean cross-entropy over all target tokens.

    Args:
        run: the current run. The gradient is computed for the parameters in its scope.
        examples: tokenized edits. The cross-entropy is computed only for their target tokens.

    Returns:
        name -> gradient in the shape of the parameter, in fp32 (fp64 for fp64 parameters). With FSDP2, it is sharded in
        the same way as the parameter.
    """
    return _mean_over_tokens(run, examples, lambda logits, ids: ids, lambda gradient: gradient)


def diagonal_fisher(run: EditRun, examples: Sequence[Encoded], *, seed: int = 0) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information matrix, averaged over the target tokens of the examples.

    ``F_i = E_c E_{y ~ p(.|c)} (d log p(y|c) / d w_i)^2``, where c is the text before a target token. The label y is
    sampled from the model. If the tokens of the text were the labels, the result would be the "empirical" Fisher
    information, which is a different quantity (arXiv 1905.12558).

    One backward pass per example computes the sum of the gradients of all its target tokens. The function squares this
    sum, adds up the squares of all examples, and divides the total by the number of target tokens. The result is an
    unbiased estimate, because the labels are sampled independently and the gradient of each token has mean zero.
    Therefore, products of the gradients of two tokens also have mean zero.

    Args:
        run: the current run. The information is computed for the parameters in its scope.
        examples: tokenized texts. The target tokens are ``input_ids[target_start:]``. At their positions, labels are
            sampled.
        seed: seed of the sampled labels.

    Returns:
        name -> information in the shape of the parameter, non-negative, in fp32 (fp64 for fp64 parameters). With FSDP2,
        it is sharded in the same way as the parameter.

    References:
        Overcoming catastrophic forgetting in neural networks, arXiv 1612.00796.
        Limitations of the Empirical Fisher Approximation for Natural Gradient Descent, arXiv 1905.12558.
    """
    # One generator for all examples, on the device of the logits. The global generator also orders the training data,
    # so it is not used here.
    generators: dict[torch.device, torch.Generator] = {}

    def sample(logits: Tensor, ids: Tensor) -> Tensor:
        if logits.device not in generators:
            generators[logits.device] = torch.Generator(logits.device).manual_seed(seed)
        probabilities = logits.softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generators[logits.device]).squeeze(-1)

    return _mean_over_tokens(run, examples, sample, torch.square)


def next_token_examples(sequences: Sequence[Sequence[int]]) -> list[Encoded]:
    """Convert sequences to examples for :func:`diagonal_fisher`. Every token except the first is a target token.

    Raises:
        EditError: every sequence has fewer than two tokens.
    """
    # The only token of a shorter sequence has no context.
    examples = [Encoded(list(ids), 1) for ids in sequences if len(ids) > 1]
    if not examples:
        raise EditError("texts must contain a text of at least two tokens, got only shorter texts; pass longer texts.")
    return examples


def _mean_over_tokens(
    run: EditRun, examples: Sequence[Encoded], label: LabelRule, transform: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sum ``transform(gradient)`` over the examples, and divide the sum by the number of target tokens."""
    head = run.head()
    # Every process reads all examples, so its gradients are complete without a reduction over the processes.
    gathered = gathered_parameters(run.root, run.scope)
    parameters = list(gathered.values())
    sharded = next((name for name, parameter in gathered.items() if isinstance(parameter, DTensor)), None)
    if sharded is not None:
        raise EditError(
            f"gradients per example cannot be computed with tensor parallelism, got the sharded weight {sharded}; use "
            "DDP or FSDP2, or write the mask of a GradientMask in a single process and pass its file as mask_path."
        )
    totals = [wide(torch.zeros_like(p.detach())) for p in run.scope.values()]
    device = next(run.model.parameters()).device
    hide_bar = not run.host.is_main or len(examples) < 64
    with run.reference_model(), evaluation_mode(run.model), torch.enable_grad(), run.host.forward_context():
        # disable=None shows the bar in a terminal only.
        for example in tqdm(examples, desc="gradients before the edit", leave=False, disable=hide_bar or None):
            ids = torch.tensor([example.input_ids], device=device)
            hidden = head.hidden(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]))
            logits = head.project(hidden[0, example.target_start - 1 :])
            with torch.no_grad():
                labels = label(logits, ids[0, example.target_start :].to(logits.device))
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            # backward() would write .grad, and run all hooks on the gradients (for example of DDP or of masks).
            # A parameter that the example does not use has no gradient, for example an expert that receives no token.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += shard_like(transform(gradient.to(total.dtype)), total)
    tokens = sum(len(example.input_ids) - example.target_start for example in examples)
    return {name: total.div_(tokens) for name, total in zip(run.scope, totals, strict=True)}
