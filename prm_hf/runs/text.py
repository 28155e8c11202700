"""Text that comes from files, shown as it was typed."""


def printable(text: object) -> str:
    """The text on one line, with every character that a terminal would obey instead of showing written as `\\x1b`."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return "".join(shown)


def one_line(text: object) -> str:
    """The text of another library, whose line breaks and indentation are layout."""
    return " ".join(str(text).split())


def short(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
