"""Every failure a user can meet, each with the exit code the command line ends with.

A message is one sentence that names the file, line or key, and says how to mend it.
"""


class MoesaicError(Exception):
    """A failure with a sentence for the user; the command line prints it without a traceback."""

    exit_code = 1


class RecipeError(MoesaicError):
    """The command, the recipe or the output directory cannot be used as given."""

    exit_code = 2


class DataError(MoesaicError):
    """A corpus, a tokenizer or a prompt cannot be read."""

    exit_code = 3


class CheckpointError(MoesaicError):
    """A checkpoint is damaged, incomplete or belongs to something else."""

    exit_code = 4


class DivergedError(MoesaicError):
    """Training produced a loss or gradient that is not a finite number."""

    exit_code = 5


class ResourceError(MoesaicError):
    """The disk or the memory is full."""

    exit_code = 6


class Stopped(MoesaicError):
    """Training was asked to stop, saved its state, and can be resumed (EX_TEMPFAIL)."""

    exit_code = 75
