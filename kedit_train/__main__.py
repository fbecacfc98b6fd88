"""Run a recipe with ``python -m kedit_train fit --config RECIPE.yaml`` (Lightning) or ``sft`` (TRL)."""

from kedit_train.cli.console import ending_interrupts


def main() -> None:
    """Run the command, which is imported here because the import takes several seconds, in which ^C is possible."""
    with ending_interrupts():
        from kedit_train.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
