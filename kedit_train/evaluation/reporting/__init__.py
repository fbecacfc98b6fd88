"""Ways to display a report: terminal, Markdown, model card, plots and experiment loggers."""
