"""The one error that this package raises on purpose."""


class EditError(ValueError):
    """Something about an edit cannot be done as asked.

    The message is one line that says what is wrong, where, and what to do. It is raised before the
    first optimizer step wherever that is possible.
    """
