"""Faults in reading tokenizers and the rows of chats, and the tests that notice them."""

from mutations.fault import Fault

CHAT = "text/test_chat.py::"
FOLDER = "text/test_folders.py::test_an_edited_folder_gives_the_ids_of_transformers"
TOKENIZER = "text/test_tokenizer.py::"

FAULTS = (
    Fault(
        "added_tokens_decoder is not read",
        "text/added_tokens.py",
        'added = _added_by_id(folder / CONFIG, config["added_tokens_decoder"])',
        "added = {}",
        f"{FOLDER}[added_tokens_decoder]",
    ),
    Fault(
        "added_tokens.json is not read",
        "text/added_tokens.py",
        "added = _added_by_text(folder / ADDED, named, extra or ()) | dict(in_vocabulary or {})",
        "added = dict(in_vocabulary or {})",
        f"{FOLDER}[added_tokens.json]",
    ),
    Fault(
        "special_tokens_map.json does not override tokenizer_config.json",
        "text/added_tokens.py",
        "named |= more",
        "named = more | named",
        f"{FOLDER}[map overrides config]",
    ),
    Fault(
        "the flags of an added token are dropped",
        "text/added_tokens.py",
        "return AddedToken(value, **flags)",
        "return AddedToken(value, special=bool(flags.get('special')))",
        f"{FOLDER}[ordinary added tokens]",
    ),
    Fault(
        "added tokens get ids in the order of the file",
        "text/added_tokens.py",
        "tokens = [token for _, token in sorted(self.added.items())]",
        "tokens = list(self.added.values())",
        f"{FOLDER}[ids out of order]",
    ),
    Fault(
        "a declared id that the vocabulary does not give is accepted",
        "text/added_tokens.py",
        "if (found := tokenizer.token_to_id(entry.content)) != token:",
        "if (found := tokenizer.token_to_id(entry.content)) is None:",
        f"{FOLDER}[no such id]",
    ),
    Fault(
        "add_bos_token overrules the post-processor",
        "text/loading.py",
        "TokenizersBackend(file, serialized), declared, bos,",
        "TokenizersBackend(file, serialized), declared, bos if declared.config.get('add_bos_token') is not False else "
        "None,",
        f"{FOLDER}[add_bos_token false]",
    ),
    Fault(
        "a class's own pipeline is not used",
        "text/hf_pipelines.py",
        "return declared if declared in PIPELINES else GENERIC",
        "return GENERIC",
        f"{FOLDER}[class Llama, chat]",
    ),
    Fault(
        "legacy of LlamaTokenizer is not read",
        "text/hf_pipelines.py",
        'scheme = ("always" if config.get("legacy") else "first")',
        'scheme = "first"',
        f"{FOLDER}[class LlamaFast, legacy]",
    ),
    Fault(
        "merges of equal scores are ordered by their shortest left part",
        "text/sentencepiece_model.py",
        "(-piece.score, -at, at - len(piece.text), piece.text[:at], piece.text[at:])",
        "(-piece.score, at, len(piece.text) - at, piece.text[:at], piece.text[at:])",
        "text/test_folders.py::test_tokenizer_model_gives_the_ids_of_sentencepiece[Mistral, EOS]",
    ),
    Fault(
        "a message's train flag is not read",
        "text/messages.py",
        'given = {key: row[key] for key in ("weight", *SWITCHES) if row.get(key) is not None}',
        'given = {key: row[key] for key in ("weight",) if row.get(key) is not None}',
        f"{CHAT}test_a_flag_of_a_message_decides_whether_it_is_learnt[train]",
    ),
    Fault(
        "an unknown key of a message is dropped",
        "text/messages.py",
        "    _refuse_unknown(place, row, keys)\n",
        "",
        f"{CHAT}test_a_row_that_is_no_chat_says_where",
    ),
    Fault(
        "system_prompt beside the messages is dropped",
        "text/messages.py",
        'SYSTEM = ("system", "system_prompt", "system_message")',
        'SYSTEM = ("system",)',
        f"{CHAT}test_the_message_of_the_system_may_stand_beside_the_others[system_prompt]",
    ),
    Fault(
        "an empty message of the system is refused",
        "text/messages.py",
        'if role == "system" and not _holds(content):',
        'if role == "system" and content is None:',
        f"{CHAT}test_an_empty_message_of_the_system_is_none[]",
    ),
    Fault(
        "a token of Llama 3 that no merges make is not found",
        "text/tiktoken.py",
        "tokenizer = byte_level_pipeline(vocabulary(ranks), PATTERN, ignore_merges=True)",
        "tokenizer = byte_level_pipeline(vocabulary(ranks), PATTERN)",
        "text/test_tiktoken.py::test_a_text_that_is_a_token_is_that_token_even_if_no_merges_lead_to_it",
    ),
    Fault(
        "merges of Llama 3 are in the order of their left parts",
        "text/tiktoken.py",
        "(rank, ranks[token[:at]], ranks[token[at:]], token[:at], token[at:])",
        "(ranks[token[:at]], ranks[token[at:]], rank, token[:at], token[at:])",
        "text/test_tiktoken.py::test_ids_of_1000_texts_are_tiktokens",
    ),
    Fault(
        "every release of Llama 3 has the special tokens of 3.1",
        "text/tiktoken.py",
        'names = LLAMA3 if params and not params.get("use_scaled_rope") else LLAMA3_1',
        "names = LLAMA3_1",
        "text/test_tiktoken.py::test_special_tokens_have_the_names_of_each_release[3]",
    ),
    Fault(
        "a store's ids beyond the model are trained on",
        "data/rows/loader.py",
        "if (largest := max((int(block.max()) for block in blocks), default=0)) >= vocab_size:",
        "if (largest := max((int(block.max()) for block in blocks), default=0)) < 0:",
        "end_to_end/test_tokenizers.py::test_a_tokenizer_may_have_more_ids_than_the_model_until_one_is_needed",
    ),
    Fault(
        "the checkpoint's own tokenizer stays beside the one that was asked for",
        "text/tokenizer.py",
        "kept = [file for file in companions if file.name not in TOKENIZER_FILES or file.name == GENERATION]",
        "kept = list(companions)",
        "end_to_end/test_tokenizers.py::test_convert_takes_another_tokenizer_in_the_place_of_the_sources",
    ),
    Fault(
        "declared tokens do not change the fingerprint",
        "text/tokenizer.py",
        "if loaded.determined_by_file or isinstance(loaded.backend, SentencePieceBackend):",
        "if True:",
        "data/test_prepare.py::test_a_store_of_the_same_vocabulary_without_the_declared_tokens_is_refused",
    ),
    Fault(
        "tokens that are declared beside tokenizer.model do not change the fingerprint",
        "text/loading.py",
        "determined_by_file=build is None and set(map(repr, added)) == set(map(repr, own_tokens)),",
        "determined_by_file=build is None,",
        f"{TOKENIZER}test_whatever_changes_ids_changes_the_fingerprint",
    ),
    Fault(
        "a store of chats whose training flags were ignored is taken as prepared",
        "data/preparation/task.py",
        'options |= {"version_of_messages": 2, "named',
        'options |= {"named',
        "data/test_prepare.py::test_a_store_of_chats_whose_training_flags_were_ignored_is_refused",
    ),
)
