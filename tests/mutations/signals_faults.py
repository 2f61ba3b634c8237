"""Faults in how commands end: at a signal, together with other processes, and for want of memory or a driver."""

from mutations.fault import Fault

INTERRUPTS = "test_interrupts.py::"
THAT = f"{INTERRUPTS}test_a_command_ends_that"
FAILING = "sharded/test_failing_processes.py::"

FAULTS = (
    Fault(
        "the thread that hears signals does not end the command",
        "interrupts.py",
        "            except KeyboardInterrupt:\n                end()",
        "            except KeyboardInterrupt:\n                raise KeyboardInterrupt from None",
        f"{THAT}[is within a C function]",
    ),
    Fault(
        "an interrupted command shuts the interpreter down, while XLA compiles",
        "interrupts.py",
        "        _watch()\n    try:\n        main()\n        status = 0\n",
        "        pass\n    try:\n        try:\n            main()\n        except KeyboardInterrupt:\n"
        "            sys.exit(INTERRUPTED)\n",
        f"{INTERRUPTS}test_ctrl_c_while_xla_compiles",
    ),
    Fault(
        "signals are lost after an event loop has run",
        "interrupts.py",
        "    if signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False) != _wakeup:\n",
        "    if False:\n",
        f"{THAT}[runs an event loop that takes the wakeup file]",
    ),
    Fault(
        "temporary files stay after an interrupt",
        "interrupts.py",
        "before, _cleaning = _cleaning, True",
        "before, _cleaning = _cleaning, False",
        f"{INTERRUPTS}test_temporary_files_are_removed_first",
    ),
    Fault(
        "the cleanup may take as long as it likes",
        "interrupts.py",
        "    latest.start()",
        "    threading.Thread(target=latest.join)",
        f"{THAT}[cleans up for too long]",
    ),
    Fault(
        "a job in the background of a script hears Ctrl-C",
        "interrupts.py",
        "if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:",
        "if True:",
        f"{INTERRUPTS}test_a_signal_that_the_parent_ignores_stays_ignored",
    ),
    Fault(
        "a command that failed ends with status 0",
        "interrupts.py",
        "        os._exit(status)\n",
        "        os._exit(0)\n",
        f"{INTERRUPTS}test_a_command_ends_with_its_status_and_all_of_its_output",
    ),
    Fault(
        "output that is still in the buffer is lost",
        "interrupts.py",
        "                stream.flush()",
        "                pass",
        f"{INTERRUPTS}test_a_command_ends_with_its_status_and_all_of_its_output",
    ),
    Fault(
        "a run that stopped after saving ends with status 0",
        "cli/training.py",
        "    if not outcome.finished:\n        sys.exit(STOPPED)",
        "    if not outcome.finished:\n        sys.exit(0)",
        f"{INTERRUPTS}test_the_first_ctrl_c_saves_and_says_so",
    ),
    Fault(
        "a second Ctrl-C waits for the save",
        "parallel/stop_signal.py",
        "            if number == signal.SIGINT:\n                raise KeyboardInterrupt\n",
        "",
        f"{INTERRUPTS}test_a_second_ctrl_c_ends_a_save_at_once",
    ),
    Fault(
        "a SIGTERM that a launcher forwards again ends a save",
        "parallel/stop_signal.py",
        "            if number == signal.SIGINT:\n",
        "            if number:\n",
        "train/test_loop.py::test_a_second_sigterm_lets_the_save_go_on",
    ),
    Fault(
        "Ctrl-C stops one of several processes alone",
        "parallel/stop_signal.py",
        "            os.kill(os.getpid(), signal.SIGTERM)",
        "            pass",
        "sharded/test_processes.py::test_ctrl_c_in_one_of_two_processes_ends_both_and_one_and_then_two_go_on_to_the_losses_of_one",
    ),
    Fault(
        "other processes do not hear of a failure",
        "parallel/failure.py",
        "client.key_value_set(FAILURE, json.dumps(failure))",
        "pass",
        f"{FAILING}test_an_error_of_one_process_ends_both",
    ),
    Fault(
        "every process prepares the data at once",
        "parallel/hosts.py",
        "    if (client := coordinator()) is not None and not is_main():\n",
        "    if (client := coordinator()) is not None and False:\n",
        f"{FAILING}test_the_main_process_prepares_the_data_first",
    ),
    Fault(
        "a wait for workers misses an interrupt",
        "data/preparation/partial_stores.py",
        "wait(list(connections), timeout=INTERRUPT_S)",
        "wait(list(connections))",
        "data/test_prepare.py::test_an_interrupt_that_does_not_wake_the_main_thread_ends_it_too",
    ),
    Fault(
        "XLA's exhausted memory is a traceback",
        "cli/failures.py",
        '"RESOURCE_EXHAUSTED" in text',
        '"EXHAUSTED RESOURCE" in text',
        "test_failures.py::test_exhausted_memory_is_explained",
    ),
    Fault(
        "JAX's assertion about its platforms is a traceback",
        "parallel/mesh.py",
        "except (RuntimeError, AssertionError) as error:",
        "except RuntimeError as error:",
        "test_failures.py::test_a_missing_driver_is_explained",
    ),
    Fault(
        "signals of libraries count as Ctrl-C",
        "interrupts.py",
        "if signal.getsignal(number) is not _in_main_thread:",
        "if number == 0:",
        "test_interrupts.py::test_signals_that_libraries_handle_do_not_end_a_command",
    ),
)
