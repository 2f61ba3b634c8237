"""Faults of what is kept for the backward pass on CPUs, and of huge pages."""

from mutations.fault import Fault

HUGE = "test_huge_pages.py"

FAULTS = (
    Fault(
        "remat: layers keep their inputs as 16-bit floats",
        "model/decoder.py",
        "x = kept(x, LAYER_INPUT)",
        "x = x + 0",
        "model/test_decoder.py::test_what_cpus_keep_in_bfloat16_are_integers[layer]",
    ),
    Fault(
        "remat: 16-bit floats are kept as they are",
        "model/products.py",
        "bits = as_bits(x)",
        "bits = None",
        "model/test_decoder.py::test_what_cpus_keep_in_bfloat16_are_integers[elementwise]",
    ),
    Fault(
        "remat: the derivative of what is kept as integers is lost",
        "model/products.py",
        "primals[1].dtype), tangents[1]",
        "primals[1].dtype), tangents[1] * 0",
        "model/test_decoder.py::test_gradients_in_bfloat16_are_those_without_integers",
    ),
    Fault(
        "step: the norm of the gradients leaves out what does not divide into blocks",
        "train/step.py",
        "if x.ndim == 0 or x.shape[-1] % BLOCK:\n        return jnp.sum(jnp.square(x))",
        "if x.ndim == 0 or x.shape[-1] % BLOCK:\n        return jnp.zeros(())",
        "train/test_step.py::test_the_global_norm_is_that_of_all_elements[cpu]",
    ),
    Fault(
        "huge pages: the command starts itself again and again",
        "huge_pages.py",
        "os.environ[TUNABLES] = REQUEST",
        "os.environ['OTHER'] = REQUEST",
        f"{HUGE}::test_commands_that_train_execute_themselves_with_huge_pages[train]",
    ),
    Fault(
        "huge pages: a setting of the user is replaced",
        "huge_pages.py",
        "if TUNABLES in os.environ or not sys.executable",
        "if os.environ.get(TUNABLES) == REQUEST or not sys.executable",
        f"{HUGE}::test_others_do_not",
    ),
    Fault(
        "huge pages: options of the interpreter are lost",
        "huge_pages.py",
        "os.execv(sys.executable, sys.orig_argv)",
        "os.execv(sys.executable, [sys.executable, *sys.argv])",
        f"{HUGE}::test_it_happens_once_with_the_same_process_and_arguments",
    ),
    Fault(
        "huge pages: the command does not ask for them",
        "__main__.py",
        "use_huge_pages(sys.argv[1:])",
        "pass",
        f"{HUGE}::test_the_command_asks_before_it_begins",
    ),
)
