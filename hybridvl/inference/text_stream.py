"""Tokens to text as they come: whole characters only, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MOST_UNFINISHED = 3  # bytes of a UTF-8 character that lacks its last


class TextStream:
    """The text of one growing row of tokens, handed out as soon as it is certain.

    Args:
        decode: tokens to text, special tokens left out.
        stops: texts that end the row; neither they nor what follows is handed out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._context: list[int] = []  # the last tokens that were written out: some decoders look at neighbours
        self._pending: list[int] = []  # tokens since then
        self._taken = 0  # characters of the pending tokens' text that were taken already
        self._held = ""  # certain text that may be the beginning of a stop text

    def push(self, token: int) -> str:
        """Take one more token; the text that has become certain."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._pending_text()
        # A character of several bytes decodes to U+FFFD until its last byte is there: to one, or to one a byte.
        certain = text
        for _ in range(_MOST_UNFINISHED):
            certain = certain.removesuffix(_UNFINISHED)
        new = certain[self._taken :]
        self._taken = max(self._taken, len(certain))
        if certain == text:
            # Tokens without text, special ones, are no neighbours to what follows.
            self._context, self._pending, self._taken = (self._pending if text else self._context), [], 0
        return self._until_stop(new, last=False)

    def finish(self) -> str:
        """The rest of the text, unfinished characters as U+FFFD; no more tokens may follow."""
        if self.stopped:
            return ""
        new = self._pending_text()[self._taken :]
        self._pending, self._taken = [], 0
        return self._until_stop(new, last=True)

    def _pending_text(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :] if self._pending else ""

    def _until_stop(self, new: str, last: bool) -> str:
        text, self._held = self._held + new, ""
        # The one that is complete first, whether tokens are characters or lines.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        if not last:
            held = self._stop_beginning(text)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text

    def _stop_beginning(self, text: str) -> int:
        """Length of the longest end of the text with which a stop text begins."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        ends = range(longest, 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
