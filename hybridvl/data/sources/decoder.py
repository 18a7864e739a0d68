"""One video after its opening: its packets, and its frames as they are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridvl.data.sources.interrupts import Interrupt
from hybridvl.data.video_stream import Length, Unreadable, explained, frame_rate, open_video

_USUAL_RATE = 25.0  # of a stream that neither says its rate nor lets FFmpeg guess it


class Decoder:
    """A video stream, decoded from its beginning on in constant memory.

    Args:
        source: a path or a URL.
        name: what an error message calls it.
        interrupt: ends waiting.
        format: FFmpeg's name of the format; None is to find it out.
        options: FFmpeg's options.
        timeout: longest wait in seconds, when opening and for every packet; None waits for ever.

    Attributes:
        rate: frames a second, as far as that can be told.
        timed: whether the frames have times of their own.
        finite: whether it is said when the stream ends.
        damaged: frames and packets that `good_frames` left out.

    Raises:
        Unreadable: it cannot be opened or holds no video.
    """

    def __init__(
        self,
        source: str,
        name: str,
        interrupt: Interrupt,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        import av

        self._name = name
        self._interrupt = interrupt
        self._timeout = timeout
        with interrupt.calls():
            self._container, self._stream = open_video(source, name, format, options, timeout)
        self.rate = frame_rate(self._stream) or _USUAL_RATE
        self.timed = not self._container.format.flags & av.format.Flags.no_timestamps.value
        # Of other formats a packet is marked when it is cut; of this one also where some were lost that do not matter.
        self._marks_damage = self._container.format.name != "mpegts"
        self.finite = self._container.duration is not None
        self.damaged = 0

    def use_threads(self) -> None:
        """Decode several frames at a time: faster, but a frame comes only when some more have arrived."""
        self._stream.thread_type = "AUTO"

    def own_time(self, frame: Any) -> float | None:
        """The time that the stream gives to a frame, in seconds; None if it gives none."""
        return None if frame.pts is None else float(frame.pts * self._stream.time_base)

    def whole_frames(self) -> Iterator[Any]:
        """PyAV's frames in the order in which they are shown, up to the first that is damaged.

        Raises:
            Unreadable: after them, if the stream is damaged or shorter than it says.
        """
        length, shown = Length(self._container, self._stream), 0
        packets, damage, decoded_until = self._packets(), None, None
        while damage is None:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                if not packet.size and length.falls_short(self.rate):
                    raise Unreadable(self._name, "it is truncated")
                if packet.is_corrupt and self._marks_damage:
                    raise Unreadable(self._name, "it is truncated or damaged")
                with explained(self._name):
                    decoded = packet.decode()
                if packet.size:
                    length.see(packet)
                    decoded_until = packet.dts
            except Unreadable as error:
                damage, decoded = error, self._held_back(decoded_until)
            for frame in decoded:
                if frame.is_corrupt:
                    raise Unreadable(self._name, "it is damaged")
                shown += 1
                yield frame
        if damage is not None:
            raise damage
        if not shown:
            raise Unreadable(self._name, "none of its frames can be decoded")

    def good_frames(self) -> Iterator[Any]:
        """PyAV's frames in the order in which they are shown, but for those that are damaged, which are counted.

        Raises:
            Unreadable: after them, if the stream broke off.
        """
        packets, lost = self._packets(), None
        while lost is None:
            try:
                packet = next(packets, None)
            except Unreadable as error:
                lost, decoded = error, self._held_back(None)
            else:
                if packet is None:
                    return
                decoded = self._decoded(packet)
            for frame in decoded:
                if frame.is_corrupt:
                    self.damaged += 1
                else:
                    yield frame
        raise lost

    def close(self) -> None:
        """Give up the file or the connection; may be called again."""
        with self._interrupt.calls():
            self._container.close()

    def _packets(self) -> Iterator[Any]:
        """The stream's packets, and one without data at its end."""
        packets = self._container.demux(self._stream)
        while True:
            with explained(self._name), self._interrupt.calls():
                packet = next(packets, None)
            if packet is None:
                return
            yield packet

    def _decoded(self, packet: Any) -> list[Any]:
        """The frames that a packet completes; none if it cannot be decoded, which is counted."""
        try:
            with explained(self._name):
                return list(packet.decode())
        except Unreadable:
            self.damaged += 1
            return []

    def _held_back(self, until: int | None) -> list[Any]:
        """What the decoder still holds, to put it in order, when nothing more will come.

        until: the latest time of decoding so far; frames that are shown later may have lost others before them, and are
            left out. None leaves out nothing.
        """
        try:
            with explained(self._name):
                held = self._stream.codec_context.decode(None)
        except Unreadable:
            return []
        return [frame for frame in held if until is None or (frame.pts is not None and frame.pts <= until)]
