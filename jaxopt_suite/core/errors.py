"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can put right: the command line prints it and exits with status 2.

    The message names the offending value and what would be legal.
    """
