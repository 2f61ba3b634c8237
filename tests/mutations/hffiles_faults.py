"""Faults in which files, names and fields of a Hugging Face folder are read, and the test that must notice each."""

from mutations.fault import Fault

FILES = "checkpoint/test_hf_files.py::"
EDITED = "checkpoint/test_edited_configs.py::"
EQUAL = f"{EDITED}test_logits_equal_those_of_transformers_and_so_do_those_of_what_is_saved"
IGNORED = "checkpoint/test_ignored_fields.py::"
CONFIG_JSON = "checkpoint/test_config_json.py::"

FAULTS = (
    # Which file, and which of two copies
    Fault(
        "an index is read before the whole file beside it",
        "checkpoint/formats/hf_files.py",
        "        if (folder / single).is_file():\n",
        '        if (folder / single).is_file() and not (folder / f"{single}.index.json").is_file():\n',
        f"{FILES}test_of_several_forms_the_one_that_transformers_reads_is_read_and_the_others_are_named",
    ),
    Fault(
        "pytorch_model.bin is read before safetensors",
        "checkpoint/formats/hf_files.py",
        "in FILES.items():\n        if (folder",
        "in reversed(FILES.items()):\n        if (folder",
        f"{FILES}test_of_several_forms_the_one_that_transformers_reads_is_read_and_the_others_are_named",
    ),
    Fault(
        "of two copies of a tensor the last file's is read, whatever the index says",
        "checkpoint/formats/hf_files.py",
        "for tensor, name in weight_map.items() if tensor in shards[name]}",
        "for tensor, name in weight_map.items() if False}",
        f"{FILES}test_of_two_copies_the_one_that_the_index_names_is_read_and_a_note_says_what_transformers_reads",
    ),
    Fault(
        "copies that differ are not said",
        "checkpoint/formats/hf_files.py",
        "if _differs(name, tensor, shards)]",
        "if False]",
        f"{FILES}test_of_two_copies_the_one_that_the_index_names_is_read_and_a_note_says_what_transformers_reads",
    ),
    Fault(
        "files of weights that are not read are not named",
        "checkpoint/formats/hf_files.py",
        "for name in weights_in(folder) if name not in names]",
        "for name in weights_in(folder) if False]",
        f"{FILES}test_a_stale_index_whose_parts_are_gone_does_not_matter_beside_the_whole_file",
    ),
    Fault(
        "what only a part holds and its index does not list is left out",
        "checkpoint/formats/hf_files.py",
        "        tensors |= shard\n",
        "        tensors |= {name: shard[name] for name in shard if name in weight_map}\n",
        f"{FILES}test_an_index_may_list_what_no_part_holds_and_leave_out_what_one_does",
    ),
    # Names, and tied heads
    Fault(
        "a tied model that keeps only its head has no table",
        "checkpoint/tied_head.py",
        "stored = tensors.get(table, None if transposed else tensors.get(head))",
        "stored = tensors.get(table)",
        f"{FILES}test_a_tied_model_may_keep_either_name",
    ),
    Fault(
        "a model without a head is tied although config.json denies it",
        "checkpoint/formats/hf.py",
        'if described_by != GIVEN and "tie_word_embeddings" not in fields:',
        "if described_by != GIVEN:",
        f"{FILES}test_where_ties_are_denied_a_missing_head_is_an_error",
    ),
    Fault(
        "a student is read from a file that has its teacher too",
        "checkpoint/formats/hf_prefixes.py",
        "if len(prefixes) > 1:",
        "if False:",
        f"{FILES}test_what_a_file_holds_instead_of_what_it_lacks_is_named",
    ),
    Fault(
        "wrappers of single layers stay in their names",
        "checkpoint/formats/hf_prefixes.py",
        'plain = {name: WRAPPERS.sub("", name) for name in tensors}',
        "plain = {name: name for name in tensors}",
        f"{FILES}test_names_that_a_wrapper_left_are_read_and_said",
    ),
    Fault(
        "a message does not say what a file holds instead",
        "checkpoint/layout.py",
        'f"; instead it holds {summarize(extra)}" if extra else ""',
        '""',
        f"{FILES}test_what_a_file_holds_instead_of_what_it_lacks_is_named",
    ),
    # config.json
    Fault(
        "false switches something on",
        "checkpoint/formats/hf_ignored_fields.py",
        "value is None or value is False or private",
        "value is None or private",
        EQUAL,
    ),
    Fault(
        "any number may stand in a field that is not known",
        "checkpoint/formats/hf_ignored_fields.py",
        "or private or name in IGNORED",
        "or private or name in IGNORED or isinstance(value, int | float)",
        f"{EDITED}test_what_might_change_the_result_is_refused_with_its_name_and_opens_without_it",
    ),
    Fault(
        "of rope_parameters and rope_scaling that differ, one is taken",
        "checkpoint/formats/hf_config.py",
        "if others and others != [values]:",
        "if False:",
        f"{CONFIG_JSON}test_what_would_be_computed_wrongly_is_refused_with_its_name_and_value",
    ),
    Fault(
        "layer_types of a family without them are not compared",
        "checkpoint/formats/hf_config.py",
        'repeated = {"layer_types": _layer_types, **family.repeated} if',
        'repeated = {"layer_types": lambda config: hf.get("layer_types"), **family.repeated} if',
        f"{EDITED}test_what_might_change_the_result_is_refused_with_its_name_and_opens_without_it",
    ),
    Fault(
        "null key and value heads mean the family's default",
        "checkpoint/formats/hf_config.py",
        "computed = field.computed_if_null or",
        "computed =",
        f"{CONFIG_JSON}test_a_field_means_what_it_means_in_transformers",
    ),
    Fault(
        "attn_factor of YaRN is refused",
        "checkpoint/formats/hf_ignored_fields.py",
        'ROPE_IGNORED = frozenset({"attn_factor", ',
        "ROPE_IGNORED = frozenset({",
        EQUAL,
    ),
    Fault(
        "a field of a table cannot be ignored",
        "checkpoint/formats/hf_ignored_fields.py",
        "return {**table, outer: _without(nested, inner)} if isinstance(nested, Mapping) else dict(table)",
        "return dict(table)",
        f"{IGNORED}test_fields_of_tables_and_names_with_a_dot_are_left_out",
    ),
    Fault(
        "an adapter's base is read with the fields that were to be ignored",
        "checkpoint/registry.py",
        "if format in OPENERS_IGNORING:",
        'if format == "hf":',
        f"{IGNORED}test_the_base_of_an_adapter_is_read_without_it",
    ),
    Fault(
        "what is ignored is not said",
        "checkpoint/formats/config_source.py",
        'as requested",) if present else ()',
        'as requested",) if False else ()',
        f"{IGNORED}test_every_command_that_opens_a_checkpoint_has_the_option",
    ),
    # Messages
    Fault(
        "verify does not say that a layout was assumed",
        "cli/checkpoints.py",
        "if (layout := pair[0].assumed_layout) is not None:",
        "if (layout := None) is not None:",
        "checkpoint/test_compare.py::test_verify_says_what_it_compared_and_that_a_layout_was_assumed",
    ),
    Fault(
        "the likeliest formats are the first of the table",
        "checkpoint/registry.py",
        "key=resemblance, reverse=True)[:3]",
        "key=lambda name: 0)[:3]",
        "checkpoint/test_formats.py::"
        "test_a_folder_of_no_format_is_refused_with_what_is_in_it_and_the_likeliest_formats",
    ),
    Fault(
        "bidirectional attention is taken for a harmless field",
        "checkpoint/formats/hf_families.py",
        '"is_causal": (True, None),',
        '"is_causal": (True, False, None),',
        "checkpoint/test_edited_configs.py::test_what_might_change_the_result_is_refused_with_its_name_and_opens_without_it",
    ),
)
