"""Run a recipe with ``python -m kedit_train fit --config RECIPE.yaml`` (Lightning) or ``sft`` (TRL)."""

from kedit_train.cli.main import main

if __name__ == "__main__":
    main()
