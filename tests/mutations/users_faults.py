"""Faults in what a newcomer reads: messages, advice and help, and the test that must notice each."""

from mutations.fault import Fault

ARGUMENTS = "test_cli.py::test_a_mistake_in_arguments_is_two_lines"

FAULTS = (
    Fault(
        "values outside the choices are left to the parser",
        "cli/arguments.py",
        "if argument.choices and value not in argument.choices:",
        "if argument.choices and value in OTHER_VALUES:",
        f"{ARGUMENTS}[convert a b --to onnx-",
    ),
    Fault(
        "options without a value are left to the parser",
        "cli/arguments.py",
        'if not rest or rest[0] == "--" or _is_option(rest[0]):',
        "if not rest and equals:",
        f"{ARGUMENTS}[generate model --seed-",
    ),
)
