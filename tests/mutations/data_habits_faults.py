"""Faults in what users give and get around data and recipes, and the test that must notice each."""

from mutations.fault import Fault

INPUTS = "test_inputs.py::"
RECIPE = "test_recipe.py::"
SOURCES = "data/test_sources.py::"
CACHED = "data/test_cached.py::"
LOADER = "data/test_loader.py::"

FAULTS = (
    Fault(
        "a home folder behind the prefix of a format is not expanded",
        "inputs.py",
        'r"(?P<format>[\\w-]+::)?(?P<path>~.*)"',
        'r"(?P<format>)(?P<path>~.*)"',
        f"{INPUTS}test_a_leading_tilde_is_expanded_as_the_shell_does",
    ),
    Fault(
        "an option's home folder is a folder named ~",
        "cli/shared.py",
        "instance_from_str=lambda words: named_path(words[0])",
        "instance_from_str=lambda words: Path(words[0])",
        f"{INPUTS}test_python_and_the_command_line_take_paths_below_home",
    ),
    Fault(
        "UTF-32 is taken for UTF-16, whose mark it begins with",
        "inputs.py",
        '    (codecs.BOM_UTF32_LE, "utf-32"),\n',
        "",
        f"{INPUTS}test_text_is_decoded_by_its_byte_order_mark[utf-32]",
    ),
    Fault(
        "a name that looks like a number is one",
        "runs/recipe.py",
        "return text if _takes(hint, text) and not _takes(hint, value) else value",
        "return value",
        f"{RECIPE}test_an_override_is_laid_over_the_file",
    ),
    Fault(
        "a run of the old packing goes on with the new one",
        "runs/recipe.py",
        "(data if kept is None else kept.data).packing_method",
        "data.packing_method",
        f"{RECIPE}test_a_run_goes_on_with_the_packing_that_it_began_with",
    ),
    Fault(
        "a folder with brackets is a choice of letters",
        "data/readers/file_names.py",
        "return glob.escape(folder) + rest",
        "return folder + rest",
        f"{SOURCES}test_a_folder_that_exists_is_that_folder_in_a_glob",
    ),
    Fault(
        "of two equal keys the last one is taken",
        "data/readers/json_text.py",
        "    if len(found) < len(pairs):\n",
        "    if len(found) > len(pairs):\n",
        f"{SOURCES}test_a_key_that_stands_twice_makes_a_row_unreadable",
    ),
    Fault(
        "a row of a table with too few cells is filled up",
        "data/readers/separated.py",
        "if len(cells) == len(header):\n                yield location, dict(zip(header, cells, strict=True))",
        "if len(cells) <= len(header):\n                yield location, dict(zip(header, cells, strict=False))",
        f"{SOURCES}test_a_bad_csv_file_is_named",
    ),
    Fault(
        "a pointer is read as text",
        "data/readers/sources.py",
        "        refuse(file)\n",
        "        pass\n",
        f"{SOURCES}test_a_git_lfs_pointer_is_called_one",
    ),
    Fault(
        "a web page is a damaged checkpoint",
        "inputs.py",
        "WEB_PAGE.match(_beginning(path)):",
        "WEB_PAGE.fullmatch(_beginning(path)):",
        f"{INPUTS}test_a_file_of_a_checkpoint_that_is_another_is_called_what_it_is",
    ),
    Fault(
        "the hash of a file that changed just now is remembered",
        "disk/hashes.py",
        "> SETTLED_S",
        "> -1e12",
        f"{CACHED}test_an_edit_of_the_same_size_is_noticed[False]",
    ),
    Fault(
        "a file is known by size and time of modification alone",
        "disk/hashes.py",
        '        "ctime_ns": found.st_ctime_ns,\n',
        '        "ctime_ns": 0,\n',
        f"{CACHED}test_an_edit_of_the_same_size_is_noticed[True]",
    ),
    Fault(
        "a store is known by the names of its sources",
        "data/preparation/task.py",
        '[[_suffix(file["path"]), hashes[file["path"]]] for',
        '[[file["path"], hashes[file["path"]]] for',
        f"{CACHED}test_copies_of_other_names_are_the_same_store_and_are_named",
    ),
    Fault(
        "the ending of a file does not matter",
        "data/preparation/task.py",
        '[[_suffix(file["path"]), hashes[file["path"]]] for',
        '[[hashes[file["path"]]] for',
        f"{CACHED}test_what_is_read_otherwise_is_another_store",
    ),
    Fault(
        "a store in use is removed",
        "data/preparation/store.py",
        "fcntl.flock(file, fcntl.LOCK_SH)",
        "fcntl.flock(file, fcntl.LOCK_UN)",
        f"{CACHED}test_a_store_that_another_process_reads_is_in_use",
    ),
    Fault(
        "what is being prepared is removed",
        "data/preparation/cached.py",
        "        if (entry.folder / LOCK).exists():\n",
        "        if not entry.folder.exists():\n",
        f"{CACHED}test_what_a_killed_process_left_is_removed_and_what_another_makes_is_not",
    ),
    Fault(
        "conversations are cut by default",
        "data/config.py",
        '"best_fit" if prompts else "stream"',
        '"stream"',
        f"{LOADER}test_rows_of_instructions_begin_with_a_prompt_by_default",
    ),
    Fault(
        "runs of one name share their id",
        "train/trackers.py",
        "else secrets.token_hex(8)",
        "else folder.name",
        "train/test_trackers.py::test_runs_of_one_name_have_ids_of_their_own_and_keep_them",
    ),
    Fault(
        "a resumed run gets another id",
        "train/trackers.py",
        "    if not kept.is_file():\n",
        "    if True:\n",
        "train/test_trackers.py::test_runs_of_one_name_have_ids_of_their_own_and_keep_them",
    ),
    Fault(
        "the bar is drawn before the first step",
        "train/loggers.py",
        "        self._bar: Progress | None = None\n",
        "        self._bar: Progress | None = self._started_bar() if self._draws else None\n",
        "train/test_loggers.py::test_an_error_before_the_first_step_is_not_printed_over_a_bar",
    ),
    Fault(
        "a hint names the package in an index",
        "extras.py",
        "{source or ' '.join(_libraries(installed.requires or [], extra))}",
        "{source or f'{NAME}[{extra}]'}",
        "test_extras.py::test_without_a_record_the_libraries_are_named",
    ),
    Fault(
        "a colleague's store is hidden where it cannot be removed",
        "data/preparation/cached.py",
        "    if not all(\n",
        "    if not any(\n",
        f"{CACHED}test_a_store_of_a_colleague_is_kept_whole_and_the_others_are_removed",
    ),
    Fault(
        "a store that may only be read counts as in use for ever",
        "data/preparation/cached.py",
        'return file.open("rb")',
        "raise",
        f"{CACHED}test_a_store_that_may_only_be_read_is_in_use_where_it_is_open",
    ),
    Fault(
        "the stores that a run keeps are pruned as unused",
        "runs/components.py",
        "        mark_used(store, recipe.data)\n",
        "",
        "end_to_end/test_own_folder.py::test_text_may_be_gone_where_what_was_prepared_from_it_is_there",
    ),
    Fault(
        "one file that cannot be read waits for the hashes of all others",
        "data/preparation/task.py",
        "            stop.set()  # do not read the others to the end\n",
        "",
        f"{CACHED}test_a_file_that_cannot_be_read_ends_the_reading_of_the_others",
    ),
)
