"""Faults in paths, in what counts as a checkpoint, and in overwriting, and the test that must notice each."""

from mutations.fault import Fault

PATHS = "checkpoint/test_paths.py::"
NAMES = f"{PATHS}test_100_names_are_saved_restored_opened_and_converted"
MATCHING = f"{PATHS}test_runs_whose_names_match_each_other_are_not_mixed"
DOTS = f"{PATHS}test_a_path_with_dots_in_it_is_opened"
INCOMPLETE = f"{PATHS}test_a_checkpoint_that_was_not_written_completely_ends_training_and_removes_none"
REPLACING = "checkpoint/test_replacing.py::"
KILLED = f"{REPLACING}test_a_kill_at_every_moment_leaves_the_old_or_the_new_checkpoint_and_all_foreign_files"
SECOND = f"{REPLACING}test_of_two_checkpoints_in_one_folder_the_second_and_foreign_files_are_left"
USER = "end_to_end/test_user_files.py::"
NATIVE, STORED, REPLACES = (
    "checkpoint/state/orbax_state.py",
    "checkpoint/state/saved_state.py",
    "checkpoint/replacing.py",
)

FAULTS = (
    # Paths
    Fault(
        "Orbax gets every path as it is",
        STORED,
        "if PLAIN.fullmatch(self.path):",
        "if self.path:",
        NAMES,
    ),
    Fault(
        "a run v* merges the files of a run vX",
        STORED,
        "(/[A-Za-z0-9_.+=,@-]+",
        "(/[A-Za-z0-9_.+=,@*-]+",
        MATCHING,
    ),
    Fault(
        "TensorStore's own suffix in a name is passed to it",
        STORED,
        "(?<!\\.__lock)",
        "",
        f"{PATHS}test_a_run_of_every_kind_of_name_is_restored",
    ),
    Fault(
        "the descriptor in a checkpoint's path is closed while it is read",
        STORED,
        "weakref.finalize(self, os.close, descriptor)",
        "os.close(descriptor)",
        NAMES,
    ),
    Fault(
        "a path with .. in it is passed to TensorStore",
        "checkpoint/state/saved_state.py",
        "    place = folder.resolve() / str(step)\n",
        "    place = folder.absolute() / str(step)\n",
        DOTS,
    ),
    Fault(
        "the hidden folder of a long name has a longer one",
        "disk/locks.py",
        "if len(os.fsencode(name)) > LONGEST_NAME:",
        "if not name:",
        f"{REPLACING}test_a_name_of_the_greatest_length_is_written_and_overwritten",
    ),
    # What counts as saved
    Fault(
        "a written checkpoint is not opened again",
        NATIVE,
        "if (damage := find_damage(self._folder, step, expected)) is None:",
        "if (damage := None) is None:",
        f"{INCOMPLETE}[found at the end-no arrays]",
    ),
    Fault(
        "chunks of a written checkpoint are not counted",
        STORED,
        "if chunks[name] != count:",
        "if chunks[name] > count:",
        f"{INCOMPLETE}[found at the end-a layer]",
    ),
    Fault(
        "shapes of a written checkpoint are not compared",
        STORED,
        "if (found := (store.shape, store.dtype.numpy_dtype.name)) != (shape, dtype):",
        "if (found := (store.shape, store.dtype.numpy_dtype.name))[1] != dtype:",
        f"{INCOMPLETE}[found at the end-a shape]",
    ),
    Fault(
        "older checkpoints are removed before the new one is verified",
        NATIVE,
        "options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, create=True)",
        "options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, create=True, max_to_keep=self._keep)",
        f"{INCOMPLETE}[found at the end-no arrays]",
    ),
    Fault(
        "a user's folder among the checkpoints is removed with old ones",
        NATIVE,
        "if (place / ITEM).is_dir():",
        "if place.is_dir():",
        f"{PATHS}test_files_and_folders_of_others_among_the_checkpoints_stay",
    ),
    # Overwriting
    Fault(
        "stale shards stay",
        REPLACES,
        "            (folder / name).unlink(missing_ok=True)\n",
        "            (folder / CONFIG).unlink(missing_ok=True)\n",
        f"{SECOND}[hf]",
    ),
    Fault(
        "new files are moved in before the old ones are gone",
        REPLACES,
        "    (new / REPLACEMENT_FILE).rename(folder / REPLACEMENT_FILE)\n",
        '    (new / "config.json").rename(folder / "config.json")\n'
        "    (new / REPLACEMENT_FILE).rename(folder / REPLACEMENT_FILE)\n",
        KILLED,
    ),
    Fault(
        "config.json is the first file that is moved in",
        REPLACES,
        "add = sorted(record.add, key=lambda name: (name == CONFIG, name))",
        "add = sorted(record.add, key=lambda name: (name != CONFIG, name))",
        KILLED,
    ),
    Fault(
        "a replacement that goes on removes new files as old ones",
        REPLACES,
        "    if len(waiting) == len(add):  # otherwise",
        "    if waiting:  # otherwise",
        KILLED,
    ),
    Fault(
        "a checkpoint half replaced is opened",
        "checkpoint/registry.py",
        "    complete_replacement(folder)\n",
        "",
        f"{REPLACING}test_whoever_opens_a_checkpoint_completes_its_replacement",
    ),
    Fault(
        "any folder with a config.json is a checkpoint",
        REPLACES,
        'if "model_type" not in read_json_or_empty(folder / CONFIG) or not found:',
        'found = found or [()]\n        if "model_type" not in read_json_or_empty(folder / CONFIG):',
        f"{REPLACING}test_a_folder_that_is_not_a_checkpoint_is_refused_with_a_list",
    ),
    Fault(
        "a file that the user changed is overwritten",
        REPLACES,
        "unchanged = {name for name, sha256 in others.items() if _hash(folder / name) == sha256}",
        "unchanged = set(others)",
        f"{REPLACING}test_a_file_that_the_user_changed_is_not_overwritten",
    ),
    Fault(
        "a user's file with the contents of a new one becomes camelid's",
        REPLACES,
        "if name in own or not os.path.lexists(folder / name)]",
        "if name]",
        f"{REPLACING}test_a_checkpoint_of_another_system_is_replaced_with_its_shards",
    ),
    Fault(
        "a manifest may name files outside its folder",
        REPLACES,
        "if name != REPLACEMENT_FILE and _is_inside(folder, name))",
        "if name != REPLACEMENT_FILE)",
        f"{REPLACING}test_a_manifest_that_names_files_outside_its_folder_removes_none",
    ),
    Fault(
        "the user's files below a store are not looked for",
        "data/preparation/existing.py",
        'for path in folder.rglob("*") if path.is_symlink()',
        'for path in folder.glob("*") if path.is_symlink()',
        f"{USER}test_files_beside_a_store_are_named_and_the_store_stays",
    ),
    Fault(
        "a downloaded record is followed",
        REPLACES,
        'if path.is_symlink() or about.get("inode") != path.stat().st_ino:',
        "if path.is_symlink():",
        f"{REPLACING}test_a_record_that_came_with_a_folder_is_not_followed",
    ),
    Fault(
        "a record removes and adds files outside its folder",
        REPLACES,
        "        if not _is_inside(folder, name):\n",
        "        if name is None:\n",
        f"{REPLACING}test_a_record_that_names_files_outside_its_folder_is_refused",
    ),
    Fault(
        "a record moves files of others from where a link leads",
        REPLACES,
        "        if not _is_inside(new, name):\n",
        "        if name is None:\n",
        f"{REPLACING}test_a_record_that_moves_files_from_where_a_link_leads_is_refused",
    ),
    Fault(
        "new files are made where a link leads",
        "disk/atomic.py",
        "if (temporary := unfinished(destination)).is_symlink():",
        "if not (temporary := unfinished(destination)):",
        f"{REPLACING}test_a_link_in_the_place_of_the_temporary_folder_is_refused",
    ),
    Fault(
        "the lock is removed before the folder has its name",
        "checkpoint/folder.py",
        "            temporary.rename(destination)\n",
        "            (temporary / LOCK).unlink()\n"
        "            temporary.rename(destination)\n"
        "            (destination / LOCK).touch()\n",
        "checkpoint/test_folder.py::test_a_process_that_starts_while_another_one_ends_takes_nothing_from_it",
    ),
    Fault(
        "a temporary folder is removed with its lock",
        "disk/atomic.py",
        "    _empty(folder)\n    (folder / LOCK).unlink()\n",
        "    (folder / LOCK).unlink()\n    _empty(folder)\n",
        "checkpoint/test_folder.py::test_a_folder_is_removed_before_its_lock",
    ),
    Fault(
        "two processes that write one small file use one temporary name",
        "disk/atomic.py",
        'f".{secrets.token_hex(8)}.incomplete"',
        '".file.incomplete"',
        "test_atomic.py::test_many_writers_of_one_file_leave_one_of_theirs",
    ),
    Fault(
        "a checkpoint is converted over its source",
        "checkpoint/convert.py",
        "        refuse_sources(destination, checkpoint.source_paths)\n",
        "        pass\n",
        "checkpoint/test_delta.py::test_a_source_is_found_behind_links",
    ),
    Fault(
        "a delta replaces its base",
        "checkpoint/adapters/delta.py",
        "        refuse_sources(destination, (*one.source_paths, *other.source_paths))\n",
        "        refuse_sources(destination, other.source_paths)\n",
        "checkpoint/test_delta.py::test_a_destination_is_never_one_of_the_sources",
    ),
    # A refused command writes nothing
    Fault(
        "the recipe is written before the run is accepted",
        "runs/run.py",
        "        start = find_start(",
        "        record(folder, recipe, components.files, components.data)\n        start = find_start(",
        f"{USER}test_a_refused_start_leaves_a_run_as_it_was",
    ),
    Fault(
        "the folder that was made for a lock stays",
        "disk/locks.py",
        "                place.rmdir()\n",
        "                place.exists()\n",
        f"{USER}test_a_first_start_that_is_refused_when_its_folder_is_locked_leaves_nothing",
    ),
    Fault(
        "files of a run that the user changed are written again",
        "runs/run_folder.py",
        "        if name not in kept:\n",
        "        if name:\n",
        f"{USER}test_every_command_that_writes_leaves_the_files_of_others_as_they_are",
    ),
    Fault(
        "all weights in a folder count as one checkpoint",
        "checkpoint/replacing.py",
        "return {*found[0], *_named(folder, COMPANION_FILES)}",
        "return {*sum(found, []), *_named(folder, COMPANION_FILES)}",
        "checkpoint/test_replacing.py::test_of_two_checkpoints_in_one_folder_the_second_is_in_the_way",
    ),
)
