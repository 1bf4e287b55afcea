"""What a user did wrong, as opposed to what broke."""


class UserError(ValueError):
    """A mistake of the user, said in one sentence: what must hold, what was found, what to do.

    The command line prints the sentence and exits with code 2; every other exception keeps its
    traceback, because it is a fault of the library or of the machine.
    """
