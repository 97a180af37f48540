"""What ends a deployment command on purpose."""


class DeployError(ValueError):
    """An input that is missing, damaged or refused, or a form that cannot hold the network; says which and why."""

    exit_code = 2


class VerificationError(DeployError):
    """An export that does not compute what its source computes; it is not written."""

    exit_code = 1
