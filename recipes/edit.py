"""The LightningCLI entry point that all recipes use.

python recipes/edit.py fit --config recipes/quickstart.yaml
fabric run recipes/edit.py fit --config recipes/quickstart.yaml
lightning run recipes/quickstart.yaml --devices 2
"""

from kedit_train.__main__ import main

if __name__ == "__main__":
    main()
