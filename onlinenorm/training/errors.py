"""What ends a run on purpose; train.py prints the message alone and exits with `exit_code`."""


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message starts with the key."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what happened, where, and what to do."""

    exit_code = 1


class Interrupted(RunError):
    """The run was asked to stop by a signal and has saved itself."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
