"""Run a recipe: ``python -m kedit_train fit`` trains with Lightning, and ``python -m kedit_train sft`` with TRL."""

from kedit_train.cli.console import ending_interrupts


def main() -> None:
    """Run the command line. If the user presses ^C, even during the slow import, print one line and no traceback."""
    with ending_interrupts():
        from kedit_train.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
