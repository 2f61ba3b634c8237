"""Faults in `camelid.Trainer`, and the test that must notice each."""

from mutations.fault import Fault

TRAINER = "test_trainer.py::"

FAULTS = (
    Fault(
        "evaluation packs rows in another way than the run",
        "runs/evaluation.py",
        "    packing = data.packing_method  # by default, it depends on the training data\n",
        '    packing = "none"\n',
        f"{TRAINER}test_a_story_from_random_values_to_a_text",
    ),
    Fault(
        "rows that were changed keep the name of their file",
        "runs/datasets.py",
        "        self._file = _write(_checked(rows, self._what), folder)\n",
        "        self._file = self._file or _write(_checked(rows, self._what), folder)\n",
        f"{TRAINER}test_an_iterator_is_read_once_and_a_list_again",
    ),
    Fault(
        "a file of rows that somebody edited is kept",
        "runs/datasets.py",
        "if not (path.is_file() and filecmp.cmp(temporary, path, shallow=False)):",
        "if not path.is_file():",
        f"{TRAINER}test_a_file_of_rows_is_named_after_its_content",
    ),
    Fault(
        "the name of a missing file is trained on as a text",
        "runs/datasets.py",
        'if item.startswith("hf:") or ENDINGS.search(item):',
        'if item.startswith("hf:"):',
        f"{TRAINER}test_strings_are_names_if_they_could_be",
    ),
    Fault(
        "callbacks do not learn of checkpoints",
        "runs/run.py",
        "            log.saved(made)\n",
        "",
        f"{TRAINER}test_callbacks_are_called_when_metrics_are_written_and_checkpoints_saved",
    ),
    Fault(
        "only the first callback is called",
        "train/metrics_log.py",
        "for callback in self._callbacks:",
        "for callback in self._callbacks[:1]:",
        f"{TRAINER}test_callbacks_are_called_when_metrics_are_written_and_checkpoints_saved",
    ),
    Fault(
        "fields that are given do not replace those that are chosen",
        "runs/finetune.py",
        "    table = laid_over(table, request.fields)\n",
        "",
        f"{TRAINER}test_chats_are_finetuned_with_adapters_as_the_command_does",
    ),
    Fault(
        "validation data have no chat template",
        "runs/finetune.py",
        "choose_templates(itertools.chain(*options.values()), tokenizer",
        'choose_templates(options["train"], tokenizer',
        f"{TRAINER}test_chats_are_finetuned_with_adapters_as_the_command_does",
    ),
    Fault(
        "a template that a run wrote is used without its name",
        "runs/finetune.py",
        '                each["template"] = name\n',
        "                pass\n",
        f"{TRAINER}test_instructions_with_inputs_are_evaluated_as_in_the_run",
    ),
    Fault(
        "the model before training is evaluated as the trained one",
        "trainer.py",
        "if checkpoint or (checkpoint is None and self._result is not None):",
        "if self._result is not None or checkpoint:",
        f"{TRAINER}test_chats_are_finetuned_with_adapters_as_the_command_does",
    ),
    Fault(
        "rows are written into a folder of other files",
        "trainer.py",
        "            check_is_own(folder)\n",
        "",
        f"{TRAINER}test_a_call_that_lacks_something_names_it",
    ),
    Fault(
        "args and a dataset may both name the training data",
        "trainer.py",
        "if not complete and name in self._fields",
        "if False and name in self._fields",
        f"{TRAINER}test_arguments_that_do_not_exist_or_contradict_each_other_are_refused",
    ),
)
