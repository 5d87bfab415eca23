"""What is wrong with the input."""


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what and why, in a sentence."""
