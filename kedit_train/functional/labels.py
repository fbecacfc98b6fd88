"""The label value that marks a position as not supervised."""

# The `ignore_index` of torch.nn.functional.cross_entropy, which Hugging Face models and TRL use as well.
IGNORE_INDEX = -100
