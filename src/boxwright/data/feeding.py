"""Between the loader's reading and its collating: batches read ahead by processes that may die or get stuck.

    reader 0   batches s, s+2, s+4, ...   its memory: beat | slot | slot   ┐
    reader 1   batches s+1, s+3, ...      its memory: beat | slot | slot   ┴→   the training process, in order

A batch is a function of its number, so a reader that died is begun again at the first of its batches that was not
delivered, and the batches are what they would have been. Readers share no lock and no queue: one that is killed or
stopped, at whatever instruction, harms its own memory alone, and only 16 bytes a batch go through its pipe, which are
there whole or not at all. (PyTorch's DataLoader tells of a dead worker by an exception out of a signal handler,
wherever training happens to be, and waits for ever on a stopped one, which it has to ask for each tensor.)
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ctypes import c_uint8
from functools import partial
from multiprocessing import connection
from multiprocessing.context import BaseContext
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from boxwright.types import BoxwrightError

log = logging.getLogger(__name__)

SLOTS = 2  # batches that a reader is ahead, as many as PyTorch's DataLoader
RESTARTS, WITHIN = 3, 100  # so many deaths in so many batches are bad luck; one more and there is a cause
TICK = 0.5  # seconds between two looks at a reader that keeps us waiting
LARGE = 1 << 16  # bytes; arrays from here on are laid into the slot itself, smaller ones into the pickle beside them
HEAD = 4096  # bytes before the slots, for the beat
ALIGNED = 64  # bytes

Read = TypeVar("Read")
Read_co = TypeVar("Read_co", covariant=True)
Ready = TypeVar("Ready")
Memory = Any  # what exports a writable buffer that both processes see

_here = threading.local()  # .beat: of the process or thread that reads
_MESSAGE = struct.Struct("<2q")  # where in the memory a batch's pickle begins and ends
NO_ROOM = (0, 0)  # or that its slot was too small: then the training process reads the batch itself


class ReadingError(BoxwrightError):
    """The pictures cannot be had: a file never comes, or reading processes die again and again, or memory is out."""

    exit_code = 74


class Source(Protocol[Read_co]):
    """Numbered batches. It is copied into the reading processes: pickled where they are not forked."""

    def read(self, number: int) -> Read_co:
        """Batch `number`, a function of the number alone; `reading` is called before each file."""
        ...


def reading(path: os.PathLike[str]) -> None:
    """Tell whoever waits for this batch which file is read next: it is named if it never comes, or is the last."""
    beat: _Beat | None = getattr(_here, "beat", None)
    if beat:
        beat.begin(path)


class _Beat:
    """Which file was begun last and how many were, in memory that another process may see."""

    def __init__(self, memory: memoryview) -> None:
        self._numbers = memory[:16].cast("q")  # files begun, length of the path
        self._path = memory[16:HEAD]

    def begin(self, path: os.PathLike[str]) -> None:
        text = os.fsencode(path)[: len(self._path)]
        self._path[: len(text)] = text
        self._numbers[1] = len(text)
        self._numbers[0] += 1

    def count(self) -> int:
        return self._numbers[0]

    def __str__(self) -> str:
        """Where the reading is: it may have ended, or hang, in this file or on the way to the next."""
        path = os.fsdecode(bytes(self._path[: self._numbers[1]]))
        return f"after {path} was begun" if path else "before a picture was begun"

    def clear(self) -> None:
        self._numbers[1] = 0


def feed(
    source: Source[Read],
    finish: Callable[[int, Read], Ready],
    numbers: range,
    *,
    workers: int,
    capacity: int,
    timeout: float,
    begin: Callable[[int], None],
) -> Iterator[Ready]:
    """`finish(number, read)` of each batch in order, read by `workers` processes, or by a thread where that is 0.

    `finish` runs here and must copy what it keeps: what was read lies in a slot of `capacity` bytes that is used anew.
    `begin(number)` is called in each process before its first batch. An exception of `read` is raised here at its
    batch, as it was; a picture that takes longer than `timeout` seconds, a `MemoryError`, and readers that keep dying
    are a `ReadingError` that names the picture.
    """
    if not workers:
        return (finish(number, _read_here(source, number, timeout)) for number in numbers)
    return _Feed(source, finish, numbers, min(workers, len(numbers)), capacity, timeout, begin)


class _Death(NamedTuple):
    number: int  # of the batch that was waited for
    place: str


class _Feed(Generic[Read, Ready]):
    """The training process's end: batch after batch from the reader whose turn it is."""

    def __init__(
        self,
        source: Source[Read],
        finish: Callable[[int, Read], Ready],
        numbers: range,
        workers: int,
        capacity: int,
        timeout: float,
        begin: Callable[[int], None],
    ) -> None:
        self._source, self._finish, self._numbers, self._timeout = source, finish, numbers, timeout
        self._done = 0  # batches
        self._deaths: list[_Death] = []
        self._readers: list[_Reader[Read]] = []
        self._end = weakref.finalize(self, _kill_all, self._readers, os.getpid())
        for index in range(workers):
            reader = _Reader(source, begin, capacity)
            reader.start(numbers[index::workers])
            self._readers.append(reader)

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        if self._done >= len(self._numbers) or not self._end.alive:
            self._end()
            raise StopIteration
        try:
            ready = self._next(self._numbers[self._done])
        except Exception:
            self._end()
            raise
        self._done += 1
        return ready

    def _next(self, number: int) -> Ready:
        reader = self._readers[self._done % len(self._readers)]
        while True:
            if not _await(reader.arrived, reader.beat, self._timeout):
                raise _stuck(reader.beat, self._timeout)
            message = reader.message()
            if message is not None:
                break
            self._restart(reader, number)
        if message == NO_ROOM:
            ready = self._finish(number, _read_here(self._source, number, self._timeout))
        else:
            outcome, heard = reader.unpack(*message)
            for record in heard:
                logging.getLogger(record.name).handle(record)
            ready = self._finish(number, _unwrap(outcome))
        reader.release()
        return ready

    def _restart(self, reader: _Reader[Read], number: int) -> None:
        reader.kill()
        cause, death = reader.bury(), _Death(number, str(reader.beat))
        self._deaths = [d for d in self._deaths if number - d.number < WITHIN] + [death]
        told = f"a reading process ended {cause}, {death.place}"
        if len(self._deaths) > RESTARTS:
            before = ", ".join(dict.fromkeys(d.place for d in self._deaths[:-1]))
            raise ReadingError(
                f"{told}; {RESTARTS} others ended within {WITHIN} batches before it: {before}. Take a picture out that "
                "is named again and again; if memory ran out, lower --workers, --imgsz or --batch"
            )
        log.warning("%s; another takes its place (%d of %d)", told, len(self._deaths), RESTARTS)
        reader.start(self._numbers[self._done :: len(self._readers)])


class _Reader(Generic[Read]):
    """One reading process, its memory and its pipe, as the training process sees them."""

    def __init__(self, source: Source[Read], begin: Callable[[int], None], capacity: int) -> None:
        self._context = multiprocessing.get_context()
        self._memory = _shared_memory(self._context, HEAD + SLOTS * capacity)
        self._view = memoryview(self._memory).cast("B")
        self.beat = _Beat(self._view)
        self._work = source, begin, capacity

    def start(self, numbers: range) -> None:
        """Begin a process that reads these batches."""
        self.beat.clear()
        try:
            ours, theirs = self._context.Pipe()
            arguments = (*self._work, numbers, self._memory, theirs)
            process = self._context.Process(target=_work, args=arguments, daemon=True, name="boxwright-reader")
            with warnings.catch_warnings():
                # Python 3.12 on: "may lead to deadlocks" beside other threads. A reader takes no lock of theirs.
                warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
                process.start()
        except OSError as error:
            raise ReadingError(f"no reading process could be begun: {error.strerror}. Lower --workers") from None
        theirs.close()  # in every other process, so that its end shows when it dies
        self._pipe, self._process = ours, process

    def arrived(self, seconds: float) -> bool:
        """Whether a message has come, or the process gone, within so many seconds."""
        return bool(connection.wait([self._pipe, self._process.sentinel], seconds))

    def message(self) -> tuple[int, int] | None:
        """What has come; None from the dead."""
        try:
            return _MESSAGE.unpack(self._pipe.recv_bytes()) if self._pipe.poll() else None
        except (EOFError, OSError):
            return None

    def unpack(self, start: int, end: int) -> tuple[Read | _Failed, list[logging.LogRecord]]:
        """The batch, its large arrays still in the slot."""
        spans, stream = pickle.loads(self._view[start:end])
        return pickle.loads(stream, buffers=[self._view[a:b] for a, b in spans])

    def release(self) -> None:
        """Let the slot be used again."""
        with suppress(OSError):  # it has died meanwhile, which its next batch will tell
            self._pipe.send_bytes(b"")

    def kill(self) -> None:
        """A reader has nothing to lose, and may be stopped or stuck: it is not asked."""
        self._process.kill()
        self._pipe.close()

    def bury(self) -> str:
        """What it died of. One that hangs in the kernel is left there after a second."""
        self._process.join(1)
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"with exit code {code}"
        return f"by signal {-code} ({signal.strsignal(-code)}{', perhaps as memory ran out' if code == -9 else ''})"


def _kill_all(readers: Sequence[_Reader[Any]], owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it since
        for reader in readers:
            reader.kill()
        for reader in readers:
            reader.bury()


def _shared_memory(context: BaseContext, size: int) -> Memory:
    try:
        if context.get_start_method() == "fork":
            return mmap.mmap(-1, size)  # inherited; unlike /dev/shm, of 64 MB in a container, as large as memory
        return context.RawArray(c_uint8, size)
    except (OSError, MemoryError):
        raise ReadingError(
            f"there are no {size >> 20} MB of memory for a reading process. Lower --workers, --imgsz or --batch"
        ) from None


def _await(arrived: Callable[[float], bool], beat: _Beat, timeout: float) -> bool:
    """Wait for something to arrive; False once no file has been begun for `timeout` seconds of waiting."""
    seen, waited = beat.count(), 0.0
    while waited < timeout:
        began = time.monotonic()
        if arrived(TICK):
            return True
        if (now := beat.count()) != seen:
            seen, waited = now, 0.0
        else:
            waited += min(time.monotonic() - began, 2 * TICK)  # not the hours that we were stopped ourselves: Ctrl-Z
    return False


def _stuck(beat: _Beat, timeout: float) -> ReadingError:
    return ReadingError(
        f"reading stands still for {timeout:g} s, {beat}. Does its disk or network share answer? Mend that and go on "
        "with --resume, or allow for more with --data-timeout"
    )


# In the reading process, or in the thread that stands for it


class _Failed(NamedTuple):
    """What came instead of a batch."""

    error: Exception


def _unwrap(outcome: Read | _Failed) -> Read:
    if isinstance(outcome, _Failed):
        raise outcome.error
    return outcome


def _attempt(source: Source[Read], number: int, beat: _Beat) -> Read | _Failed:
    _here.beat = beat
    try:
        return source.read(number)
    except MemoryError:
        return _no_memory(beat)
    except Exception as error:  # noqa: BLE001 it is raised again, where the batch is waited for
        return _Failed(error)


def _no_memory(beat: _Beat) -> _Failed:
    return _Failed(ReadingError(f"reading ran out of memory, {beat}. Lower --workers, --imgsz or --batch"))


def _read_here(source: Source[Read], number: int, timeout: float) -> Read:
    """In a thread, because a read that never returns can be left but not interrupted; it ends with the process."""
    beat, found = _Beat(memoryview(bytearray(HEAD))), list[Any]()
    thread = _idle.pop() if _idle else _Thread()
    outcome = thread.begin(partial(_attempt, source, number, beat))

    def arrived(seconds: float) -> bool:
        with suppress(Empty):
            found.append(outcome.get(timeout=seconds))
        return bool(found)

    if not _await(arrived, beat, timeout):
        raise _stuck(beat, timeout)
    _idle.append(thread)
    return _unwrap(found[0])


class _Thread:
    """A thread that stays. One that ends takes OpenCV's lock, after Python believes it gone; a process that is forked
    just then would find it locked for ever.
    """

    def __init__(self) -> None:
        self._tasks = SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]]]()
        threading.Thread(target=self._work, daemon=True, name="boxwright-reader").start()

    def begin(self, task: Callable[[], Any]) -> SimpleQueue[Any]:
        """What the task comes to will be put here."""
        outcome = SimpleQueue[Any]()
        self._tasks.put((task, outcome))
        return outcome

    def _work(self) -> None:
        while True:
            task, outcome = self._tasks.get()
            outcome.put(task())
            del task, outcome  # nothing is held on to while idle


_idle: list[_Thread] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads are not forked


def _work(
    source: Source[Any],
    begin: Callable[[int], None],
    capacity: int,
    numbers: range,
    memory: Memory,
    pipe: connection.Connection,
) -> None:
    """A reading process: batch after batch into the slots in turn, as they become free; it is killed in the end."""
    _keep_to_the_parent()
    heard = _Heard()
    logger = logging.getLogger("boxwright")
    logger.handlers, logger.propagate = [heard], False  # a handler's lock may be held by a thread that was not forked
    view = memoryview(memory).cast("B")
    beat = _Beat(view)
    begin(numbers.start)
    with suppress(EOFError, ConnectionError):  # the training process is gone
        for turn, number in enumerate(numbers):
            if turn >= SLOTS:
                pipe.recv_bytes()  # a slot is free
            start = HEAD + turn % SLOTS * capacity
            outcome = _attempt(source, number, beat)
            if isinstance(outcome, _Failed):
                outcome = _Failed(_portable(outcome.error))
            try:
                message = _pack((outcome, heard.take()), view, start, start + capacity)
            except MemoryError:
                message = _pack((_no_memory(beat), ()), view, start, start + capacity)
            pipe.send_bytes(_MESSAGE.pack(*message))
        while True:
            pipe.recv_bytes()  # to end here, with bytes unread, would take back what was sent


def _pack(parcel: Any, view: memoryview, start: int, end: int) -> tuple[int, int]:
    """Lay a parcel into the memory from `start` on: large arrays as they are, then a pickle of all else.

    Where the pickle is, or `NO_ROOM` before `end`.
    """
    large: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes >= LARGE:
            large.append(raw)
        return raw.nbytes < LARGE

    stream = pickle.dumps(parcel, protocol=5, buffer_callback=keep)
    spans: list[tuple[int, int]] = []
    for raw in large:
        spans.append((start, start + raw.nbytes))
        start += -(-raw.nbytes // ALIGNED) * ALIGNED
    index = pickle.dumps((spans, stream))
    if start + len(index) > end:
        return NO_ROOM
    for (a, b), raw in zip(spans, large, strict=True):
        view[a:b] = raw
    view[start : start + len(index)] = index
    return start, start + len(index)


def _portable(error: Exception) -> Exception:
    """The exception as it can cross: with its traceback as a note if it is no message to the user."""
    if not isinstance(error, BoxwrightError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 whatever its constructor makes of it
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


class _Heard(logging.Handler):
    """Keeps what is logged while a batch is read; it is said where the batch is delivered."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._records.append(record)

    def take(self) -> list[logging.LogRecord]:
        taken, self._records = self._records, []
        return taken


def _keep_to_the_parent() -> None:
    """Whoever asks a run to stop asks the training process; when that is gone, so are we, whatever we wait for."""
    for name in ("SIGINT", "SIGUSR1", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()


def _leave_with_parent(born_of: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive() and os.getppid() == born_of:  # the sentinel tells on Windows, the number elsewhere
        parent.join(1)
    os._exit(1)
