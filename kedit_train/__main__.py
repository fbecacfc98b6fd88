"""Run a recipe with ``python -m kedit_train fit --config RECIPE.yaml`` (Lightning) or ``sft`` (TRL)."""

from kedit_train.cli.console import ending_interrupts


def main() -> None:
    """Run the command. The slow import is inside of the ``with`` block, so ^C during the import prints one line."""
    with ending_interrupts():
        from kedit_train.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
