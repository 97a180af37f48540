"""The one error a report ends with when its input cannot be trusted."""


class ReportError(ValueError):
    """A run folder is missing, damaged or belongs into another table; the message names the file and the fix."""

    exit_code = 1
