"""``python -m kedit_train fit --config RECIPE.yaml`` runs a recipe in Lightning, ``... sft ...`` runs it in TRL."""

from kedit_train.cli.main import main

if __name__ == "__main__":
    main()
