"""Faults in the order of rows, and in the plan of which documents share a row."""

from mutations.fault import Fault

RANDOMNESS, BEST_FIT = "data/test_randomness.py::", "data/test_best_fit.py::"

FAULTS = (
    Fault(
        "the permutation has fewer rounds",
        "data/randomness.py",
        "ROUNDS = 6",
        "ROUNDS = 3",
        f"{RANDOMNESS}test_nothing_changes_between_releases",
    ),
    Fault(
        "the domain is one integer too small where the size is a power of four plus one",
        "data/randomness.py",
        "half = max(1, -(-(size - 1).bit_length() // 2))",
        "half = max(1, -(-max(0, size - 2).bit_length() // 2))",
        f"{RANDOMNESS}test_the_permutation_is_the_one_that_is_documented[65537]",
    ),
    Fault(
        "large indices are mixed with too few bits",
        "data/randomness.py",
        "left ^ (splitmix64(right + key) & mask)",
        "left ^ ((right * key) & mask)",
        f"{RANDOMNESS}test_the_order_looks_random[10000000]",
    ),
    Fault(
        "every epoch of many rows has one order",
        "data/rows/mixture.py",
        'seed_of(self.seed, "rows", source, epoch)',
        'seed_of(self.seed, "rows", source, 0)',
        "data/test_mixture.py::test_few_rows_and_many_are_read_once_an_epoch[4097]",
    ),
    Fault(
        "a run that read its rows in another order is resumed",
        "runs/run_folder.py",
        "        _check_row_orders(folder, kept, data)\n",
        "",
        "end_to_end/test_row_order.py::test_a_run_with_another_order_of_many_rows_is_not_resumed[the order]",
    ),
    Fault(
        "a run that recorded nothing about its data is resumed in another order",
        "runs/run_folder.py",
        'before.get("train", [])]\n    for number',
        'before.get("train", now["train"])]\n    for number',
        "end_to_end/test_row_order.py::test_a_run_with_another_order_of_many_rows_is_not_resumed[data.json]",
    ),
    Fault(
        "fragments of one length are assigned in no order",
        "data/rows/best_fit.py",
        'starts[np.argsort(lengths, kind="stable")]',
        'starts[np.argsort(lengths, kind="stable")[::-1]]',
        f"{BEST_FIT}test_every_fragment_is_in_one_row[split]",
    ),
    Fault(
        "lengths overflow where a row has 65,536 tokens",
        "data/rows/best_fit.py",
        "np.min_scalar_type(sequence_length)",
        "np.min_scalar_type(sequence_length - 1)",
        f"{BEST_FIT}test_every_fragment_is_in_one_row[truncate]",
    ),
)
