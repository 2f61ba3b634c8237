"""Ctrl-C ends a command at any time, with one line of output and exit status 130.

By default, Python raises KeyboardInterrupt in the main thread. That is delayed while a library computes, can be lost
in a destructor or a broad `except`, and the shutdown of the interpreter crashes if XLA is compiling in another thread.
Therefore a thread that waits for the signal ends the process of a command. Files on disk are then as after a kill: each
appears under its name only when it is complete. Programs that import camelid keep Python's behavior.
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
"""Exit status of a command that Ctrl-C ended: 128 + SIGINT, as in shells."""
STOPPED = 75
"""Exit status of training that a signal stopped after it saved a checkpoint: EX_TEMPFAIL of sysexits.h."""
END_S = 1.5
"""Time in which an interrupted command can remove its temporary files."""

RESUME = "run the same command again to resume"
"""Advice of commands that continue where they were interrupted."""

SignalHandler = Callable[[int], None]


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt


_handler: SignalHandler = _interrupt
_wakeup: int | None = None
_cleaning = False
_advice = ""
_before_end: Callable[[], None] | None = None
_message_lock = threading.Lock()
_message_shown = False
_undivided = threading.Lock()


def run_command(main: Callable[[], None]) -> None:
    """Runs `main` as the command of this process, and exits without the shutdown of the interpreter.

    It has to be called before slow imports. If the process was started with SIGINT ignored, SIGINT stays ignored.
    """
    status = 1  # for an exception

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    atexit.register(leave)  # the first registered function runs last
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
    """Starts the thread that handles signals."""
    global _wakeup
    reader, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _in_main_thread)
    threading.Thread(target=_dispatch, args=(reader,), name="camelid-signals", daemon=True).start()


def _in_main_thread(number: int, frame: object) -> None:
    # The number is in the pipe already, unless an event loop has replaced the pipe by its own.
    assert _wakeup is not None
    if signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False) != _wakeup:
        os.write(_wakeup, bytes([number]))
    if _cleaning and _handler is _interrupt:
        raise KeyboardInterrupt


def _dispatch(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if signal.getsignal(number) is not _in_main_thread:
                continue  # Python writes the numbers of all signals with a handler, also of libraries
            try:
                _handler(number)
            except KeyboardInterrupt:
                end()


def end() -> NoReturn:
    """Ends the process of a command as Ctrl-C does, within END_S seconds."""
    global _message_shown
    # Output may block, and a block of `cleaned_up` may take too long.
    latest = threading.Timer(END_S, os._exit, (INTERRUPTED,))
    latest.daemon = True
    latest.start()
    with _message_lock:
        if not _message_shown:
            _message_shown = True
            # A progress bar may have hidden the cursor.
            before, after = ("\r\x1b[K", "\x1b[?25h") if os.isatty(2) else ("", "")
            with contextlib.suppress(OSError):
                os.write(2, f"{before}camelid: interrupted{_advice}{after}\n".encode())
            if _before_end is not None:
                with contextlib.suppress(Exception):
                    _before_end()
            _undivided.acquire(timeout=END_S)  # it is never released: no other block begins
    if _cleaning and threading.current_thread() is not threading.main_thread():
        latest.join()
    os._exit(INTERRUPTED)


def set_advice(advice: str) -> None:
    """Sets the advice that is appended to the message of an interrupted command."""
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
def undivided() -> Iterator[None]:
    """An interrupt waits for the end of this short block, at most END_S seconds, before it ends the command."""
    with _undivided:
        yield


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """An interrupt in this block is raised as KeyboardInterrupt, so that the block can remove its temporary files.

    A command has END_S seconds for that.
    """
    global _cleaning
    before, _cleaning = _cleaning, True
    try:
        yield
    finally:
        _cleaning = before


@contextlib.contextmanager
def handling_signals(handler: SignalHandler, *numbers: signal.Signals) -> Iterator[None]:
    """Calls `handler(number)` for these signals in the block; if it raises KeyboardInterrupt, the program ends.

    A command calls it immediately in a separate thread; other programs call it in the main thread, between bytecodes.
    Ignored signals stay ignored, and all handlers are unchanged if the block does not run in the main thread.
    """
    global _handler
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    installed = _in_main_thread if _wakeup is not None else lambda number, frame: handler(number)
    handler_before, handlers = _handler, {}
    try:
        _handler = handler
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                handlers[number] = signal.signal(number, installed)
        yield
    finally:
        for number, before in handlers.items():
            if before is not None:  # a handler that was not installed from Python cannot be restored
                signal.signal(number, before)
        _handler = handler_before
