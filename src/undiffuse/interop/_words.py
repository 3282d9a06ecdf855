"""How words of foreign files stand in our messages."""


def short(text: str, most: int = 80) -> str:
    """A foreign file's own words, for one line of a message: escaped, the middle left out."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-(most // 2) :]}"
    return text if text.isprintable() else repr(text)[1:-1]
