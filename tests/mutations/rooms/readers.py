"""What comes from strangers: chat templates, tokenizers, Hugging Face folders, libraries that are built."""

from __future__ import annotations

from tests.mutations.frame import Mutation

SANDBOX = "tokenizer/chat/test_sandbox.py"
ADDED = "tokenizer/test_added_tokens.py"
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
    # Ids
    Mutation(
        "added tokens that are not special move in conversations",
        "tokenizer/tokenizer.py",
        '        ids = {new_ids[token["content"]]: token["id"] for token in content["added_tokens"]}\n',
        "        ids = {new_ids[name]: id_ for id_, name in names.items()}\n",
        f"{ADDED}::test_every_added_token_keeps_its_id_in_a_conversation",
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
    Mutation(
        "others' names for a setting are not known",
        "config/findings.py",
        "    if told is not None:\n",
        "    if told is None:\n",
        "config/test_findings.py::test_foreign_name_is_answered_with_ours",
    ),
)
