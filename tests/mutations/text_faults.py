"""Faults in the sandbox of chat templates and in the command line, and the tests that notice them."""

from mutations.fault import Fault

HOSTILE = "text/test_chat.py::test_a_hostile_template_is_refused"
LIMITED = "text/test_chat.py::test_what_a_template_builds_is_limited"

FAULTS = (
    Fault(
        "a template may look at private attributes",
        "text/sandbox.py",
        "return super().is_safe_attribute(obj, attr, value) and not",
        "return not",
        f"{HOSTILE}[{{{{ messages.__class__ }}}}-the attribute __class__ of list is not allowed]",
    ),
    Fault(
        "a template may change the messages",
        "text/sandbox.py",
        "class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):",
        "class Environment(jinja2.sandbox.SandboxedEnvironment):",
        f"{HOSTILE}[{{{{ messages.append(1) }}}}-the attribute append of list is not allowed]",
    ),
    Fault(
        "str.format is allowed",
        "text/sandbox.py",
        "if super().wrap_str_format(value) is not None:",
        "if False:",
        f"{HOSTILE}[{{{{ '{{0.__class__}}'.format(1) }}}}-str.format is not allowed]",
    ),
    Fault(
        "what blocks capture has no limit",
        "text/sandbox.py",
        'return "".join(_limited(parts))',
        'return "".join(parts)',
        f"{LIMITED}[{{% set x %}}{{{{ s }}}}{{{{ s }}}}{{% endset %}}]",
    ),
    Fault(
        "concatenation has no limit",
        "text/sandbox.py",
        'concatenation.nodes = [nodes.Filter(values, "join", [], [], None, None)]',
        "del values",
        f"{LIMITED}[{{% set x = s ~ s %}}]",
    ),
    Fault(
        "replacing in a text has no limit",
        "text/sandbox.py",
        "_check_size(len(text) + text.count(args[0]) * len(args[1]))",
        "pass",
        f"{LIMITED}[{{% set x = s.replace('x', 'xx') %}}]",
    ),
    Fault(
        "names of other systems get no suggestion",
        "runs/suggestions.py",
        'if plain in FIELD_OF and table.partition(".")[0] != "model":',
        "if not plain:",
        "test_cli.py::test_the_name_of_a_field_in_other_systems_is_refused_with_ours[--lr-optimizer.learning_rate]",
    ),
    Fault(
        "commands of other systems get no suggestion",
        "cli/__init__.py",
        "suggestion = OTHER_NAMES.get(name.lower()) or next(iter(nearest), None)",
        "suggestion = next(iter(nearest), None)",
        "test_cli.py::test_the_name_of_a_command_in_other_systems_is_refused_with_ours[tokenize-data prepare]",
    ),
    Fault(
        "help shows None",
        "cli/help.py",
        "hint = Annotated[(plain, arg(metavar=_metavar(get_args(plain)[0])), *metadata)]",
        "pass",
        "test_cli.py::test_help_shows_no_none_and_no_empty_default[train]",
    ),
)
