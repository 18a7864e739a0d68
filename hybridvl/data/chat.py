"""The chat format: messages become token ids, with labels on the answers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hybridvl.data.tokens import SPECIAL_TOKENS
from hybridvl.layers.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of a token that is not part of an answer."""

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""{"role": str, "content": str | [part]}; a part is {"type": "text", "text": str}, {"type": "image", "image": ...} with
options of `hybridvl.data.images.IMAGE_OPTIONS`, or {"type": "video", "video": ...} with options of
`hybridvl.data.video.VIDEO_OPTIONS`. What is None counts as not written."""

_PARTS = '{"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "video", "video": ...}'
_PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of one conversation.

    Attributes:
        input_ids: T token ids.
        labels: T targets: the token itself inside an answer (its closing <|im_end|> too), else IGNORED.
        answers: (start, end) of every answer in input_ids.
    """

    input_ids: list[int]
    labels: list[int]
    answers: list[tuple[int, int]]


@dataclass(frozen=True)
class Turn:
    """A message that has been checked.

    Attributes:
        role: one of ROLES.
        parts: its content, text too, as parts; image and video parts may lack their value.
        place: what an error message calls it.
    """

    role: str
    parts: list[dict[str, Any]]
    place: str


@dataclass(frozen=True)
class _Piece:
    """Either a run of text, or one token of the format by name; `answer` when it is to be predicted.

    visual: "image" or "video" when the token is the placeholder of one.
    """

    text: str = ""
    token: str = ""
    answer: bool = False
    visual: str = ""


class ChatFormat:
    """ChatML as Qwen2.5-VL and InfiniteVL use it, for one tokenizer.

    Tokens of the format come from the structure of the messages alone: text that spells `<|im_end|>` is encoded as
    plain text and cannot close a turn. An answer is encoded apart from its prompt, exactly as it is generated.

    Args:
        tokenizer: a fast tokenizer with the tokens of the format.
        system: the system turn added to messages that have none; None adds no turn.

    Raises:
        ConfigError: the system turn is no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system: str | None = DEFAULT_SYSTEM) -> None:
        from tokenizers import Tokenizer

        if system is not None and not is_text(system):
            raise ConfigError(f"system: {system!r:.80}; expected a text or null")
        self.tokenizer = tokenizer
        self.system = system
        plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        self._plain = plain
        self._encode_text = lru_cache(maxsize=8192)(self._encode_uncached)
        ids = tokenizer.get_vocab()
        self._ids = {name: ids[name] for name in SPECIAL_TOKENS}

    def __reduce__(self) -> tuple[type[ChatFormat], tuple[PreTrainedTokenizerFast, str | None]]:
        # The cache of encoded text cannot be pickled for a worker process, and need not be.
        return ChatFormat, (self.tokenizer, self.system)

    @property
    def image_token_id(self) -> int:
        """The token that stands for one merged vision token."""
        return self._ids["<|image_pad|>"]

    @property
    def video_token_id(self) -> int:
        """The token that stands for one merged vision token of a video."""
        return self._ids["<|video_pad|>"]

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows up to the longest; its positions are masked."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self._ids["<|endoftext|>"]

    def encode(
        self,
        messages: Sequence[Message],
        image_tokens: Sequence[int] = (),
        video_tokens: Sequence[int] = (),
        *,
        place: str = "messages",
        generation_prompt: bool = False,
    ) -> EncodedChat:
        """Token ids and labels of a conversation.

        Args:
            messages: the turns, oldest first.
            image_tokens: merged vision tokens of each image, in the order in which the images occur.
            video_tokens: the same for videos.
            place: what an error message calls this conversation.
            generation_prompt: end with an opened assistant turn, for a model to continue.

        Raises:
            ConfigError: malformed messages, or another number of images or videos than is given.
        """
        ids: list[int] = []
        labels: list[int] = []
        answers: list[tuple[int, int]] = []
        given = {"image": image_tokens, "video": video_tokens}
        shown = {"image": 0, "video": 0}
        for piece in self._pieces(messages, place, generation_prompt):
            if piece.visual:
                sizes = given[piece.visual][shown[piece.visual] :]
                added = [self._ids[piece.token]] * (sizes[0] if sizes else 0)
                shown[piece.visual] += 1
            else:
                added = [self._ids[piece.token]] if piece.token else self._encode_text(piece.text)
            if piece.answer:
                if labels and labels[-1] != IGNORED:
                    answers[-1] = (answers[-1][0], len(ids) + len(added))
                else:
                    answers.append((len(ids), len(ids) + len(added)))
            ids += added
            labels += added if piece.answer else [IGNORED] * len(added)
        for kind, count in shown.items():
            if count != len(given[kind]):
                raise ConfigError(f"{place}: the messages show {count} {kind}s, but {len(given[kind])} are given")
        return EncodedChat(ids, labels, answers)

    def render(
        self,
        messages: Sequence[Message],
        image_tokens: Sequence[int] | None = None,
        video_tokens: Sequence[int] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; every placeholder once, or as often as `image_tokens` and `video_tokens` say."""
        sizes = {"image": iter(image_tokens or ()), "video": iter(video_tokens or ())}
        parts = []
        for piece in self._pieces(messages, "messages", generation_prompt):
            repeats = next(sizes[piece.visual], 1) if piece.visual else 1
            parts.append((piece.token or piece.text) * repeats)
        return "".join(parts)

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text; what spells a token of the format stays text."""
        return self._encode_uncached(text) if text else []  # what is said to streams hardly comes twice

    def visual_ids(self) -> tuple[int, int]:
        """The tokens before and after an image or a video."""
        return self._ids["<|vision_start|>"], self._ids["<|vision_end|>"]

    def turn_opening(self) -> tuple[list[int], str]:
        """How a conversation begins whose user is still speaking: tokens, and a text to be tokenized with the next."""
        ids: list[int] = []
        if self.system is not None:
            ids = self.encode([{"role": "system", "content": self.system}]).input_ids
        return [*ids, self._ids["<|im_start|>"]], "user\n"

    def turn_closing(self) -> list[int]:
        """What comes between the last word of the user and the first of the answer."""
        end, start = self._ids["<|im_end|>"], self._ids["<|im_start|>"]
        return [end, *self.text_ids("\n"), start, *self.text_ids("assistant\n")]

    def _encode_uncached(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _pieces(self, messages: Sequence[Message], place: str, generation_prompt: bool) -> Iterator[_Piece]:
        turns = read_turns(messages, place)
        if self.system is not None and turns[0].role != "system":
            yield from _turn_pieces(Turn("system", [{"type": "text", "text": self.system}], place))
        for turn in turns:
            yield from _turn_pieces(turn)
        if generation_prompt:
            yield _Piece(token="<|im_start|>")
            yield _Piece("assistant\n")


def read_turns(messages: object, place: str) -> list[Turn]:
    """The messages of a conversation, checked.

    Raises:
        ConfigError: naming the message, and the part, that is not what `Message` says.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ConfigError(f"{place}: {type(messages).__name__}; expected a list of messages")
    if not messages:
        raise ConfigError(f"{place}: no messages; expected at least one turn")
    return [_read_turn(message, f"{place}[{number}]") for number, message in enumerate(messages)]


def _read_turn(message: object, place: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ConfigError(f'{place}: {message!r:.80}; expected {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ConfigError(f"{place}.role: {role!r:.80}; expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ConfigError(f"{place}.content: {type(content).__name__}; expected text or a list of parts")
    return Turn(role, [_read_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)], place)


def _read_part(part: object, place: str) -> dict[str, Any]:
    if not isinstance(part, Mapping) or part.get("type") not in ("text", *_PADS):
        raise ConfigError(f"{place}: {part!r:.80}; expected {_PARTS}")
    # Tables give every part every field, None where it was not written.
    kept = {name: value for name, value in part.items() if value is not None}
    if part["type"] != "text":
        return kept
    if not is_text(kept.get("text")):
        raise ConfigError(f"{place}.text: {kept.get('text')!r:.80}; expected a text")
    return {"type": "text", "text": kept["text"]}


def is_text(value: object) -> bool:
    """Whether a value is text that can be encoded: Python's may hold halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turn_pieces(turn: Turn) -> Iterator[_Piece]:
    answer = turn.role == "assistant"
    yield _Piece(token="<|im_start|>")
    # Neighbouring texts are tokenized as one, except that an answer begins a new one.
    text = f"{turn.role}\n"
    if answer:
        yield _Piece(text)
        text = ""
    for part in turn.parts:
        kind = part["type"]
        if kind == "text":
            text += part["text"]
            continue
        if answer:
            shown = {"image": "an image", "video": "a video"}[kind]
            raise ConfigError(f"{turn.place}: {shown} in an assistant turn; expected images and videos in user turns")
        if text:
            yield _Piece(text)
        yield _Piece(token="<|vision_start|>")
        yield _Piece(token=_PADS[kind], visual=kind)
        yield _Piece(token="<|vision_end|>")
        text = ""
    if text:
        yield _Piece(text, answer=answer)
    yield _Piece(token="<|im_end|>", answer=answer)
    yield _Piece("\n")
