"""What comes from strangers: chat templates, tokenizers, Hugging Face folders, libraries that are built."""

from __future__ import annotations

from tests.mutations.frame import Mutation

SANDBOX = "tokenizer/chat/test_sandbox.py"
ADDED = "tokenizer/test_added_tokens.py"
DAMAGED = "tools/interop/test_damaged.py"
FITTING = "tools/interop/test_fitting.py"
REFUSED = f"{SANDBOX}::test_what_takes_long_or_much_is_refused"

MUTATIONS = (
    Mutation(
        "a chat template may take any time",
        "tokenizer/chat/sandbox.py",
        "        signal.setitimer(signal.ITIMER_PROF, seconds * (1 + len(request) / MEGABYTE))",
        "        signal.setitimer(signal.ITIMER_PROF, 1000 * seconds)",
        REFUSED,
    ),
    Mutation(
        "a chat template may take any memory",
        "tokenizer/chat/sandbox.py",
        "    _limit(resource.RLIMIT_AS, _address_space() + MEMORY)\n",
        "",
        REFUSED,
    ),
    Mutation(
        "a chat template may write any text",
        "tokenizer/chat/sandbox.py",
        "            if len(written) > MOST_CHARACTERS:\n",
        "            if False:\n",
        REFUSED,
    ),
    Mutation(
        "a chat template's process may open files",
        "tokenizer/chat/sandbox.py",
        "resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):\n",
        "resource.RLIMIT_NPROC):\n",
        f"{SANDBOX}::test_the_process_can_open_and_start_nothing",
    ),
    Mutation(
        "an interrupted request leaves its answer to the next",
        "tokenizer/chat/sandbox.py",
        "                self._end()\n                raise\n",
        "                raise\n",
        f"{SANDBOX}::test_an_interrupted_request_leaves_no_answer_for_the_next",
    ),
    Mutation(
        "chat templates run outside Jinja's sandbox",
        "tokenizer/chat/environment.py",
        "class _Environment(ImmutableSandboxedEnvironment):\n",
        "class _Environment(jinja2.Environment):\n",
        f"{SANDBOX} tokenizer/chat/test_template.py tokenizer/test_chat_template.py",
    ),
    # Ids
    Mutation(
        "added tokens that are not special move in conversations",
        "tokenizer/tokenizer.py",
        '        ids = {new_ids[token["content"]]: token["id"] for token in content["added_tokens"]}\n',
        "        ids = {new_ids[name]: id_ for id_, name in names.items()}\n",
        f"{ADDED}::test_every_added_token_keeps_its_id_in_a_conversation",
    ),
    Mutation(
        "a user who writes a special token gets it",
        "tokenizer/tokenizer.py",
        "                if self._spelled and not self._spelled.isdisjoint(ids):\n",
        "                if False:\n",
        f"{ADDED}::test_text_that_spells_a_special_token_stays_text_where_the_model_looks_it_up",
    ),
    Mutation(
        "the names of special tokens can be guessed",
        "tokenizer/tokenizer.py",
        "{secrets.randbits(64)}",
        "",
        f"{ADDED}::test_names_of_special_tokens_cannot_be_guessed",
    ),
    Mutation(
        "what the user says is trained on",
        "tokenizer/tokenizer.py",
        "        loss_mask: list[bool] = (trained_before[ends] > trained_before[begins]).tolist()\n",
        "        loss_mask: list[bool] = (trained_before[ends] >= trained_before[begins]).tolist()\n",
        "tokenizer/chat/test_turns.py::test_exactly_the_assistants_turns_and_their_ends_are_trained_on",
    ),
    # Models
    Mutation(
        "an export takes a family that ignores a part of the rotation",
        "tools/interop/fitting.py",
        "    for key in family.keys:\n        values |= dict.fromkeys(key.ours, ours[key.ours[-1]])\n",
        '    values["partial_rotary_factor"] = ours["partial_rotary_factor"]\n'
        "    for key in family.keys:\n        values |= dict.fromkeys(key.ours, ours[key.ours[-1]])\n",
        f"{FITTING}::test_nearest_family {FITTING}::test_refusal_names_what_stands_in_the_way_of_the_nearest",
    ),
    Mutation(
        "a refusal names the family that is furthest",
        "tools/interop/fitting.py",
        "    least = min(map(_distance, in_the_way.values()))\n",
        "    least = max(map(_distance, in_the_way.values()))\n",
        f"{FITTING}::test_refusal_names_what_stands_in_the_way_of_the_nearest",
    ),
    Mutation(
        "links in a model's folder are followed",
        "tools/interop/hf_folder.py",
        "        check_regular(path)\n",
        "",
        f"{DAMAGED}::test_symbolic_link_is_not_followed",
    ),
    Mutation(
        "a billion layers are named before a tensor is looked for",
        "tools/interop/hf_tensors.py",
        "    if least > 1000 + 4 * present:\n",
        "    if False:\n",
        f"{DAMAGED} tools/interop/test_families.py",
    ),
    Mutation(
        "a head that differs from the embedding is dropped",
        "tools/interop/hf_tensors.py",
        "    if not same:\n",
        "    if False:\n",
        f"{DAMAGED}::test_tied_head_that_differs",
    ),
    Mutation(
        "tensors that nothing explains are dropped",
        "tools/interop/hf_tensors.py",
        "    if unexpected:\n        raise",
        "    if False:\n        raise",
        f"{DAMAGED}::test_missing_and_unexpected_tensors_are_listed",
    ),
    Mutation(
        "the library is copied into place, not renamed",
        "common/files.py",
        "        sync(written)\n        written.replace(path)\n",
        "        sync(written)\n        shutil.copyfile(written, path)\n",
        "kernels/test_build.py::test_a_library_gets_its_name_when_it_is_whole",
    ),
    Mutation(
        "a token is sent to more experts than there are",
        "config/model.py",
        '        self.require_at_most("num_experts_per_tok", "n_routed_experts")\n',
        "",
        "config/test_run.py::test_impossible_settings_are_refused_by_name",
    ),
)
