"""The one exception users can cause: its message names the file, the row or key, and the remedy."""


class InputError(ValueError):
    """Something outside the code is wrong: a file, a row, a parameter, a missing package.

    Stages and the command line print the message alone and exit with 2; any other exception is
    a defect of this project and keeps its traceback.
    """
