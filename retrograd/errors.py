"""Every error and warning that retrograd raises, in one tree.

    RetrogradError
    ├── InputError                  an argument is not what is allowed
    │   └── UnknownExample          an example id that the data set or the scores do not have
    ├── UnsupportedTraining         the training loop does something that a record cannot express
    │   ├── UnknownOptimizer        no update rule equals this optimizer
    │   ├── UnsupportedHook         a hook changes gradients or parameters behind the record's back
    │   └── UnsupportedScaler       a gradient scaler is at work
    ├── NonFinite                   a loss, gradient or parameter became NaN or infinite
    ├── SolverFailed                a solver's operator or step is not what it needs
    ├── NoSecondDerivative          a kernel of the model can be differentiated only once
    ├── ReplayMismatch              replaying a step does not give what really happened
    ├── RecordError                 something about a run folder
    │   ├── NotRecorded             the step, or what a method needs of it, is not in the record
    │   ├── CorruptRecord           a file is torn, missing or altered
    │   ├── IncompleteRecord        the recording was killed and not resumed
    │   ├── RecordExists            the folder already holds a run
    │   ├── DataChanged             the data set is not the one that was recorded
    │   └── ModelChanged            the model is not the one that was recorded
    └── MissingDependency           an optional package is not installed

    RetrogradWarning
    ├── ReplayDrift                 a replay differs from the record within the stated tolerance
    ├── RoughTraining               derivatives of this run say little about retraining
    └── UntrustedGradient           a hypergradient leaves out, or assumes, what is known to matter

Messages say what was given, what is allowed and what to do.
"""


class RetrogradError(Exception):
    """Base of every error that retrograd raises on purpose."""


class InputError(RetrogradError, ValueError):
    """An argument is not what is allowed."""


class UnknownExample(InputError):
    """An example id that the data set or the scores do not have."""


class UnsupportedTraining(RetrogradError):
    """The training loop does something that a record cannot express."""


class UnknownOptimizer(UnsupportedTraining):
    """No update rule equals this optimizer with these options."""


class UnsupportedHook(UnsupportedTraining):
    """A hook changes gradients or parameters behind the record's back."""


class UnsupportedScaler(UnsupportedTraining):
    """A gradient scaler is at work; its skipped steps are not in the record."""


class NonFinite(RetrogradError, ArithmeticError):
    """A loss, gradient or parameter became NaN or infinite."""


class SolverFailed(RetrogradError, ArithmeticError):
    """A solver's operator or step is not what it needs: not positive definite, or too large to converge."""


class NoSecondDerivative(RetrogradError):
    """A kernel of the model can be differentiated only once."""


class ReplayMismatch(RetrogradError):
    """Replaying a step does not give what really happened."""


class RecordError(RetrogradError):
    """Something is wrong with a run folder or with what is asked of it."""


class NotRecorded(RecordError, LookupError):
    """The step, or what a method needs of it, is not in the record."""


class CorruptRecord(RecordError):
    """A file of a run folder is torn, missing or altered."""


class IncompleteRecord(RecordError):
    """The recording was killed and has not been resumed."""


class RecordExists(RecordError, FileExistsError):
    """The folder already holds a run."""


class DataChanged(RecordError):
    """The data set is not the one that was recorded."""


class ModelChanged(RecordError):
    """The model is not the one that was recorded."""


class MissingDependency(RetrogradError, ImportError):
    """An optional package is not installed."""


class RetrogradWarning(UserWarning):
    """Base of every warning that retrograd gives on purpose."""


class ReplayDrift(RetrogradWarning):
    """A replay differs from the record, but within the stated tolerance."""


class UntrustedGradient(RetrogradWarning):
    """A hypergradient leaves out, or assumes, what is known to matter."""


class RoughTraining(RetrogradWarning):
    """Derivatives of this run say little about what retraining would do."""
