"""Faults in what the processes of a run decide together, and in checkpoints that change while a run begins."""

from mutations.fault import Fault

SHARED = "sharded/test_shared_folder.py::"
OLD = f"{SHARED}test_a_process_that_sees_an_old_state_of_the_folder_goes_on_with_the_main_process"

FAULTS = (
    Fault(
        "each process chooses the step to go on from",
        "runs/start.py",
        "broadcast_from_main(lambda: _step_to_resume(folder, recipe, started, from_step))",
        "_step_to_resume(folder, recipe, started, from_step)",
        OLD,
    ),
    Fault(
        "processes other than the main one say that no step is whole",
        "checkpoint/state/orbax_state.py",
        "broadcast_from_main(lambda: other_intact_steps(place))",
        "other_intact_steps(place) if is_main() else []",
        f"{SHARED}test_both_processes_name_the_steps_that_are_whole",
    ),
    Fault(
        "the arrays of a run are read twice",
        "checkpoint/state/saved_state.py",
        "if not arrays or any(",
        "if True or any(",
        "checkpoint/test_run_folder.py::"
        "test_each_device_reads_its_part_once_and_what_changed_on_the_disk_is_seen[one device]",
    ),
    Fault(
        "a run whose checkpoints vanish begins anew",
        "runs/start.py",
        "    if bool(steps) != started:\n",
        "    if False:\n",
        "end_to_end/test_damage.py::test_a_run_whose_checkpoints_vanish_while_it_starts_does_not_begin_anew",
    ),
)
