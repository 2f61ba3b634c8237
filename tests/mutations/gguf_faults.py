"""Faults in GGUF files, their tokenizers and checkpoints of one file, and the test that must notice each."""

from mutations.fault import Fault

NUMBERS = "checkpoint/test_gguf.py::test_every_quantization_is_read_bit_for_bit_as_the_gguf_package_reads_it"
TOKENIZER = "checkpoint/test_gguf_tokenizer.py::"
OWN = f"{TOKENIZER}test_a_file_has_its_own_tokenizer_and_a_folder_the_one_beside"
FILE = "checkpoint/test_single_file.py::"

FAULTS = (
    Fault(
        "the third bits of q3_k are taken as they stand, not inverted",
        "checkpoint/containers/ggml_blocks.py",
        ".astype(np.float32) - np.float32(4)\n",
        ".astype(np.float32)\n",
        NUMBERS,
    ),
    Fault(
        "the last scales of q4_k and q5_k lose their high bits",
        "checkpoint/containers/ggml_blocks.py",
        "(rest & 15) | (first >> 6) << 4",
        "rest & 15",
        NUMBERS,
    ),
    Fault(
        "what is merged first gets the lowest score",
        "checkpoint/formats/gguf_bpe.py",
        "            group -= 1\n",
        "            group += 1\n",
        f"{TOKENIZER}test_a_conversion_takes_the_tokenizer_and_its_templates_along",
    ),
    Fault(
        "a BPE is written without looking whether llama.cpp merges more",
        "checkpoint/formats/gguf_bpe.py",
        "and pair not in listed and",
        "and pair in () and",
        f"{TOKENIZER}test_a_bpe_that_does_not_merge_what_llama_cpp_would_is_refused",
    ),
    Fault(
        "tokens that fill up the vocabulary are ordinary ones",
        "checkpoint/formats/gguf_tokenizer.py",
        'f"[PAD{token}]", UNUSED, -10000.0',
        'f"[PAD{token}]", 1, -10000.0',
        f"{TOKENIZER}test_sentencepieces_tokens_scores_and_types_are_those_of_the_gguf_package",
    ),
    Fault(
        "pre-tokenizers are told by their patterns alone",
        "checkpoint/formats/gguf_bpe.py",
        "if pre.patterns == patterns and pre.ignore_merges == ignore_merges",
        "if pre.patterns == patterns",
        f"{TOKENIZER}test_the_pre_tokenizer_is_named_by_its_pattern",
    ),
    Fault(
        "normalization that llama.cpp does not do is not told",
        "checkpoint/formats/gguf_tokens.py",
        "        if differing:\n",
        "        if False:\n",
        f"{TOKENIZER}test_normalization_that_llama_cpp_does_not_do_is_told",
    ),
    Fault(
        "a file takes the tokenizer that lies beside it",
        "checkpoint/formats/gguf.py",
        "has_tokenizer_file = is_folder and any(",
        "has_tokenizer_file = any(",
        OWN,
    ),
    Fault(
        "files of another tokenizer come along with the one inside",
        "checkpoint/checkpoint.py",
        "if file.name not in tokenizer]",
        "if file.name]",
        OWN,
    ),
    Fault(
        "a space is put in front of every text, whatever the file says",
        "checkpoint/formats/gguf_vocabulary.py",
        '    if prefix:\n        spaces.insert(0, {"type": "Prepend"',
        '    if True:\n        spaces.insert(0, {"type": "Prepend"',
        f"{TOKENIZER}test_flags_and_special_tokens_of_the_file_are_followed",
    ),
    Fault(
        "only the named end of a text is one",
        "checkpoint/formats/gguf_vocabulary.py",
        "[*named, *_ids(texts, ENDS)]",
        "[*named]",
        f"{TOKENIZER}test_ends_that_only_their_names_tell_are_ends",
    ),
    Fault(
        "scores that say nothing are believed",
        "checkpoint/formats/gguf_vocabulary.py",
        "if len(text) > 1}) == 1:",
        "if len(text) > 1}) == 0:",
        f"{TOKENIZER}test_a_sentencepiece_vocabulary_that_is_unclear_is_refused",
    ),
    Fault(
        "a file is replaced without being asked",
        "checkpoint/single_file.py",
        "if destination.exists() and not overwrite:",
        "if False:",
        f"{FILE}test_files_of_others_stay_and_an_existing_one_is_replaced_only_when_asked",
    ),
    Fault(
        "what a failure leaves stays",
        "disk/atomic.py",
        "                with contextlib.suppress(OSError):\n                    remove_locked(temporary)\n",
        "                pass\n",
        f"{FILE}test_a_failure_leaves_the_old_file_and_nothing_else",
    ),
    Fault(
        "the end of a name in capitals is another one",
        "checkpoint/registry.py",
        "destination.suffix.lower() == other.suffix",
        "destination.suffix == other.suffix",
        f"{FILE}test_a_file_is_not_a_folder_and_its_name_says_its_format",
    ),
)
