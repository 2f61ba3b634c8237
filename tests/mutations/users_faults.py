"""Faults in what a newcomer reads: messages, advice and help, and the test that must notice each."""

from mutations.fault import Fault

ARGUMENTS = "test_cli.py::test_a_mistake_in_arguments_is_two_lines"

FAULTS = (
    Fault(
        "values outside the choices are left to the parser",
        "cli/arguments.py",
        "if argument.choices and value not in argument.choices:",
        "if argument.choices and value in OTHER_VALUES:",
        ARGUMENTS,
    ),
    Fault(
        "options without a value are left to the parser",
        "cli/arguments.py",
        'if not rest or rest[0] == "--" or _is_option(rest[0]):',
        "if not rest:\n                    return\n                if False:",
        ARGUMENTS,
    ),
    Fault(
        "a run that has saved nothing is advised to resume",
        "runs/run.py",
        "    if previous is None:\n        interrupts.set_advice",
        "    if previous is not None:\n        interrupts.set_advice",
        "test_interrupts.py::test_a_ctrl_c_before_the_first_checkpoint_says_that_nothing_was_saved",
    ),
    Fault(
        "the demo lets the run refuse fewer steps",
        "demo.py",
        ") > steps:",
        ") > 1000 * steps:",
        "test_cli.py::test_fewer_steps_than_a_demo_has_made_are_refused_with_its_options",
    ),
    Fault(
        "unused options of sampling are not reported",
        "cli/models.py",
        "if generation.temperature == 0 and (",
        "if generation.temperature < 0 and (",
        "test_cli.py::test_options_of_sampling_without_a_temperature_are_reported",
    ),
)
