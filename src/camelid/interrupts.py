"""Ctrl-C ends a command at any moment, with one line and exit status 130.

By default Python raises KeyboardInterrupt in the main thread. That is too late while a library computes, it is lost in
a destructor or a broad `except`, and the interpreter's shutdown crashes where XLA is still compiling in another thread.
The process of a command is therefore ended by a thread that waits for the signal. Files on disk are then as after a
kill: each appears under its name only when it is complete. Programs that import camelid keep Python's behavior.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

INTERRUPTED = 130
"""exit status of a command that Ctrl-C ended: 128 + SIGINT, as shells report it"""
STOPPED = 75
"""exit status of training that saved a checkpoint and stopped at a signal: EX_TEMPFAIL of sysexits.h, run it again"""
END_S = 1.5
"""in which an interrupted command removes its temporary files"""

Hear = Callable[[int], None]


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt


_hear: Hear = _interrupt
_wakeup: int | None = None
_cleaning = False
_advice = ""
_before_end: Callable[[], None] | None = None
_saying = threading.Lock()
_said = False


def run_command(main: Callable[[], None]) -> None:
    """Runs `main` as the command of this process, which never reaches the interpreter's own shutdown.

    Call it before anything slow is imported. Where the process was started with SIGINT ignored, it stays ignored.
    """
    status = 1  # of an exception

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # what is registered first runs last
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _watch()
    try:
        main()
        status = 0
    except SystemExit as exited:
        status = exited.code if isinstance(exited.code, int) else int(exited.code is not None)
        raise
    except KeyboardInterrupt:
        end()


def _watch() -> None:
    """Starts the thread that hears signals."""
    global _wakeup
    reader, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _in_main_thread)
    threading.Thread(target=_dispatch, args=(reader,), name="camelid-signals", daemon=True).start()


def _in_main_thread(number: int, frame: object) -> None:
    # The number is in the pipe already, unless an event loop has put a pipe of its own in the place of this one.
    assert _wakeup is not None
    if signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False) != _wakeup:
        os.write(_wakeup, bytes([number]))
    if _cleaning and _hear is _interrupt:
        raise KeyboardInterrupt


def _dispatch(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if signal.getsignal(number) is not _in_main_thread:
                continue  # Python writes the numbers of all signals that have a handler, those of libraries too
            try:
                _hear(number)
            except KeyboardInterrupt:
                end()


def end() -> NoReturn:
    """Ends the process of a command as Ctrl-C does, after END_S at the latest."""
    global _said
    # Nobody may read what is written, and a block of `cleaned_up` may take too long.
    latest = threading.Timer(END_S, os._exit, (INTERRUPTED,))
    latest.daemon = True
    latest.start()
    with _saying:
        if not _said:
            _said = True
            # A progress bar may have hidden the cursor.
            before, after = ("\r\x1b[K", "\x1b[?25h") if os.isatty(2) else ("", "")
            with contextlib.suppress(OSError):
                os.write(2, f"{before}camelid: interrupted{_advice}{after}\n".encode())
            if _before_end is not None:
                with contextlib.suppress(Exception):
                    _before_end()
    if _cleaning and threading.current_thread() is not threading.main_thread():
        latest.join()
    os._exit(INTERRUPTED)


def set_advice(advice: str) -> None:
    """Appends advice to the line that says that the command was interrupted."""
    global _advice
    _advice = f"; {advice}"


@contextlib.contextmanager
def before_end(do: Callable[[], None]) -> Iterator[None]:
    """An interrupt that ends the command in this block calls `do` first."""
    global _before_end
    _before_end = do
    try:
        yield
    finally:
        _before_end = None


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """An interrupt in this block is raised as KeyboardInterrupt, so that the block can remove its temporary files.

    In a command it has END_S for that.
    """
    global _cleaning
    before, _cleaning = _cleaning, True
    try:
        yield
    finally:
        _cleaning = before


@contextlib.contextmanager
def heard(hear: Hear, *numbers: signal.Signals) -> Iterator[None]:
    """In this block `hear(number)` is called at these signals; where it raises KeyboardInterrupt, the program ends.

    A command calls it in a thread of its own, at once; another program in its main thread, between two bytecodes.
    Ignored signals stay ignored, and all keep their handlers if the block does not run in the main thread.
    """
    global _hear
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _in_main_thread if _wakeup is not None else lambda number, frame: hear(number)
    heard_before, handlers = _hear, {}
    try:
        _hear = hear
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                handlers[number] = signal.signal(number, handler)
        yield
    finally:
        for number, before in handlers.items():
            if before is not None:  # one that was not installed from Python cannot be put back
                signal.signal(number, before)
        _hear = heard_before
