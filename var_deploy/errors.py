"""Every exception that var-deploy raises on purpose.

    VarDeployError
    ├── UsageError            a wrong argument: the caller can correct it (exit code 2)
    │   ├── LabelError        a label that the model does not have
    │   └── UnchangedError    an edit that would change nothing (exit code 1)
    ├── CheckpointError       a file that is not a checkpoint, or does not fit the model
    ├── BundleError           a bundle that is damaged, too new, or incomplete
    │   └── BundleChangedError    it was replaced or overwritten while it was in use
    ├── ExportError           the export could not finish
    ├── VerificationError     the deployed graphs and the model disagree
    ├── BackendError          a runtime is missing or refused its work
    ├── CancelledError        the work was stopped on request
    └── RefusedError          a service does not accept this now (serving.backend)

Each carries one line that says what is wrong and, where it is known, what to do about it.
"""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Return any error's message on one line; its type where it has no message.

    Terminal control characters are escaped: the message may contain text of an untrusted file.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


class VarDeployError(Exception):
    """Base of all errors of var-deploy. `exit_code` is the exit status of the command line."""

    exit_code = 1


class UsageError(VarDeployError, ValueError):
    """An argument is outside what the function or command accepts."""

    exit_code = 2


class LabelError(UsageError):
    """A class label is unknown; the message suggests close matches."""


class UnchangedError(UsageError):
    """An edit is well formed, but its mask is too small to change a token."""

    exit_code = 1


class CheckpointError(VarDeployError):
    """A checkpoint cannot be read, or its tensors are not those of the model."""


class BundleError(VarDeployError):
    """A bundle cannot be trusted: missing, damaged, incomplete or from a newer schema."""


class BundleChangedError(BundleError):
    """A bundle was replaced or overwritten while it was read or used: load it again."""


class ExportError(VarDeployError):
    """The export stopped before a bundle was complete; an older bundle was left untouched."""


class VerificationError(VarDeployError):
    """A deployed graph disagrees with the model by more than its tolerance."""


class BackendError(VarDeployError):
    """An inference runtime is not installed, or it failed."""


class CancelledError(VarDeployError):
    """The work was stopped on request; the pipeline or service can be used again."""
