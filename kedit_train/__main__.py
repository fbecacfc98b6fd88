"""Run a recipe with ``python -m kedit_train fit --config RECIPE.yaml`` (Lightning) or ``sft`` (TRL)."""

from kedit_train.cli.console import ending_interrupts


def main() -> None:
    """Run the command. ^C prints one line and no traceback, even during the slow import in the ``with`` block."""
    with ending_interrupts():
        from kedit_train.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
