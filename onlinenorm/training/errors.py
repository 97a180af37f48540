"""What ends a run on purpose."""

from onlinenorm.errors import ConfigError, Interrupted, RunError, cli_errors

__all__ = ["ConfigError", "Interrupted", "RunError", "cli_errors"]
