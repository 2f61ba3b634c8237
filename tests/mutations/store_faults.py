"""Faults in what the formats share: the tied head, the source of the configuration, and the list of formats."""

from mutations.fault import Fault

TIED, CONFIG = "checkpoint/test_tied_head.py::", "checkpoint/test_config_source.py::"

FAULTS = (
    Fault(
        "a head is compared with its table in the first row of each block only",
        "checkpoint/tensors.py",
        "index = (slice(start, min(start + rows, length)), *(slice(0, n) for n in rest))",
        "index = (slice(start, start + 1), *(slice(0, n) for n in rest))",
        f"{TIED}test_a_difference_anywhere_is_found",
    ),
    Fault(
        "a tied head that differs from its table is left out silently",
        "checkpoint/tied_head.py",
        "not same_values(tensors[table], tensors[head], transposed=transposed)",
        "False",
        f"{TIED}test_a_tied_head_is_left_out_and_another_is_refused",
    ),
    Fault(
        "config.json wins over the config that is given",
        "checkpoint/formats/config_source.py",
        "    if given is not None:\n",
        "    if given is not None and folder_with_config(*folders) is None:\n",
        f"{CONFIG}test_a_given_config_wins_and_the_first_folder_with_a_config_json_is_next",
    ),
    Fault(
        "a format that is only read is offered for writing",
        "checkpoint/registry.py",
        "WRITABLE = tuple(name for name, format in FORMATS.items() if format.plan_files is not None)",
        "WRITABLE = tuple(FORMATS)",
        f"{CONFIG}test_formats_that_are_only_read_are_not_offered_for_writing",
    ),
)
