"""``python -m kedit_train fit --config RECIPE.yaml``"""

from kedit_train.cli.edit import main

if __name__ == "__main__":
    main()
