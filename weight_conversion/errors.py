"""What goes wrong in a way that the user can mend."""


class ConversionError(Exception):
    """A sentence for the user: which file and tensor, what was found, what was expected, what to do."""
