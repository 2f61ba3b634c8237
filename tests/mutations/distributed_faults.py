"""Faults in the readers of PyTorch's distributed checkpoints, and the test that must notice each."""

from mutations.fault import Fault

TESTS = "checkpoint/test_distributed.py::"
DAMAGE = f"{TESTS}test_a_damaged_description_is_refused_by_name"

FAULTS = (
    Fault(
        "distributed: a slice of a chunk is taken from its beginning",
        "checkpoint/containers/dcp.py",
        "slice(a - start, b - start)",
        "slice(0, b - a)",
        f"{TESTS}test_slices_across_chunks_are_what_numpy_cuts",
    ),
    Fault(
        "distributed: chunks that are missing or there twice go unnoticed",
        "checkpoint/containers/dcp.py",
        "if not (times == 1).all():",
        "if times.min(initial=1) < 0:",
        f"{DAMAGE}[a chunk is there twice]",
    ),
    Fault(
        "distributed: the shape of a chunk's archive is not compared",
        "checkpoint/containers/dcp.py",
        "if (chunk.shape, chunk.dtype) != (shape, item.dtype):",
        "if chunk.dtype != item.dtype:",
        f"{DAMAGE}[a chunk of another shape]",
    ),
    Fault(
        "distributed: a chunk may lie in a file outside of the folder",
        "checkpoint/containers/dcp.py",
        r'rf"[\w.-]+{re.escape(DISTRIBUTED)}"',
        r'rf".*{re.escape(DISTRIBUTED)}"',
        f"{DAMAGE}[a file outside of the folder]",
    ),
    Fault(
        "distributed: gate and up of stacked layers change places",
        "checkpoint/formats/megatron_rows.py",
        'return TensorRule(row.path, name, "layers (slot mlp) embed", "(mlp slot) embed", along="slot")',
        'return TensorRule(row.path, name, "layers (mlp slot) embed", "(mlp slot) embed", along="slot")',
        f"{TESTS}test_what_megatron_core_wrote_has_the_numbers_of_its_source[tp2_pp2]",
    ),
    Fault(
        "distributed: rows that fill up the vocabulary stay",
        "checkpoint/formats/megatron_distributed.py",
        "shape=(config.vocab_size, *shape[1:])",
        "shape=shape",
        f"{TESTS}test_rows_that_fill_up_the_vocabulary_of_megatron_are_left_out",
    ),
    Fault(
        "only the last archive of a file has its checksums verified",
        "checkpoint/containers/torch_zip.py",
        "end = min((entry.header_offset for entry in entries), default=0)",
        "end = 0",
        f"{TESTS}test_a_changed_number_is_found_by_its_checksum",
    ),
)
