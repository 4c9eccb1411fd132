"""The one exception that means "the user can fix this": printed as a sentence, without a traceback."""


class UserError(Exception):
    """Bad input: the message says what is wrong, the value, and what to do."""
