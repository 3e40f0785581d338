"""The one exception a user is meant to read: a sentence that names what came and what is expected."""


class FlexError(ValueError):
    """Bad input. `flex` prints the sentence and ends with exit code 2; nothing has been half-written."""


def require(condition: bool, sentence: str) -> None:
    """Raises FlexError(sentence) unless the condition holds."""
    if not condition:
        raise FlexError(sentence)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
