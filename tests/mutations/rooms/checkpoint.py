"""Checkpoints: what a save puts onto the disk and when, what is verified, which ones are kept, which one is taken."""

from __future__ import annotations

from tests.mutations.frame import Mutation

WHOLE = (
    "checkpoint/test_checkpoint_death.py::test_every_file_and_folder_is_on_the_disk_before_the_checkpoint_has_its_name"
)
DEATH = "checkpoint/test_checkpoint_death.py::test_death_after_any_file_operation_leaves_a_checkpoint"
OVER_RANKS = "checkpoint/test_checkpoint_death.py::test_two_ranks_save_together_and_any_layout_loads"
DAMAGE = "checkpoint/test_checkpoint_damage.py"
HEADER = "checkpoint/test_safetensors_file.py::test_absurd_header_length_allocates_nothing"

MUTATIONS = (
    # A save
    Mutation(
        "no fsync at all",
        "common/files.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        WHOLE,
    ),
    Mutation(
        "no fsync of a tensor file",
        "checkpoint/write.py",
        '"format": "pt"})\n    sync(path)\n',
        '"format": "pt"})\n',
        WHOLE,
    ),
    Mutation(
        "COMPLETE is written before the manifest",
        "checkpoint/write.py",
        "    _put(unfinished / MANIFEST, manifest)\n    sync(unfinished / MANIFEST)\n",
        "    _put(unfinished / COMPLETE, hashlib.sha256(manifest.encode()).hexdigest())\n"
        "    _put(unfinished / MANIFEST, manifest)\n    sync(unfinished / MANIFEST)\n    sync(unfinished / COMPLETE)\n",
        WHOLE,
    ),
    Mutation(
        "the manifest is not synced before COMPLETE",
        "checkpoint/write.py",
        "    sync(unfinished / MANIFEST)\n",
        "",
        WHOLE,
    ),
    Mutation(
        "the folder gets its name before COMPLETE is in it",
        "checkpoint/write.py",
        '    _put(unfinished / COMPLETE, hashlib.sha256(manifest.encode()).hexdigest() + "\\n")\n'
        "    sync(unfinished / COMPLETE)\n    sync(unfinished)\n",
        "    unfinished.rename(folder)\n"
        '    _put(folder / COMPLETE, hashlib.sha256(manifest.encode()).hexdigest() + "\\n")\n'
        "    sync(folder / COMPLETE)\n    sync(folder)\n    folder.rename(unfinished)\n",
        f"{DEATH} {WHOLE}",
    ),
    Mutation(
        "the folder's new name is not brought onto the disk",
        "checkpoint/write.py",
        "    sync(folder.parent)\n",
        "",
        WHOLE,
    ),
    Mutation(
        "a step that is saved again is deleted first",
        "checkpoint/write.py",
        "        folder.rename(replaced)\n",
        "        shutil.rmtree(folder)\n",
        DEATH,
    ),
    Mutation(
        "a failed save leaves its half behind",
        "checkpoint/write.py",
        "        ranks.first(lambda: shutil.rmtree(unfinished, ignore_errors=True), ())\n",
        "",
        "checkpoint/test_checkpoint_death.py::test_a_failed_save_says_why_and_leaves_the_old_checkpoints",
    ),
    Mutation(
        "a save in the background writes what training changes meanwhile",
        "checkpoint/saver.py",
        "copy = self._memory.copy(write.own_pieces(state, self.ranks))",
        "copy = write.own_pieces(state, self.ranks)",
        "checkpoint/test_saver.py::test_what_is_saved_is_the_state_at_the_start_of_the_save",
    ),
    Mutation(
        "two saves at a time",
        "checkpoint/saver.py",
        "        self.wait()\n        outcome: futures.Future[Path] = futures.Future()\n",
        "        outcome: futures.Future[Path] = futures.Future()\n",
        "checkpoint/test_saver.py::test_a_second_save_waits_for_the_first_and_old_ones_go",
    ),
    Mutation(
        "the last save is given up on a full disk",
        "checkpoint/saver.py",
        "            if is_over():\n                kept =",
        "            if True:\n                kept =",
        "checkpoint/test_saver.py::test_the_last_save_is_tried_again_until_the_disk_has_room",
    ),
    Mutation(
        "older checkpoints do not give way to the last one",
        "checkpoint/saver.py",
        "make_room=True)",
        "make_room=False)",
        "checkpoint/test_saver.py::test_older_checkpoints_give_way_to_the_last_one",
    ),
    # Checksums
    Mutation(
        "the checksum is over half of the bytes",
        "common/integrity.py",
        "        return str(hashlib.file_digest(file, KINDS[kind]).hexdigest())\n",
        "        return str(KINDS[kind](file.read(path.stat().st_size // 2)).hexdigest())\n",
        f"common/test_integrity.py {DAMAGE}",
    ),
    Mutation(
        "the checksum of what is written begins anew with each piece",
        "common/integrity.py",
        "            self._digest.update(chunk)\n",
        "            self._digest = KINDS[XXH3](chunk)\n",
        "common/test_integrity.py",
    ),
    Mutation(
        "the checksum is of the file that was read back",
        "checkpoint/write.py",
        "    sync(path)\n    return entry\n",
        "    sync(path)\n    return entry_of(path)\n",
        f"{DAMAGE}::test_a_bit_flipped_between_memory_and_file_is_found",
    ),
    Mutation(
        "verification believes any checksum",
        "common/integrity.py",
        "    if checksum_of(path, kind) != entry[kind]:\n",
        '    if checksum_of(path, kind) == "":\n',
        f"{DAMAGE}::test_a_flipped_bit_is_refused",
    ),
    Mutation(
        "verification skips the optimizer's files",
        "checkpoint/checkpoint.py",
        "    names = _names_in(manifest, part)\n    with",
        "    names = [name for name in _names_in(manifest, part) if not name.startswith(OPTIMIZER)]\n    with",
        f"{DAMAGE}::test_a_flipped_bit_is_refused checkpoint/test_recovery.py",
    ),
    Mutation(
        "a rank verifies the share of another",
        "checkpoint/recovery.py",
        "        share = slice(ranks.rank, None, ranks.size)\n",
        "        share = slice(0, None, ranks.size)\n",
        OVER_RANKS,
    ),
    Mutation(
        "a file that cannot be read is taken for damage",
        "checkpoint/checkpoint.py",
        "    if isinstance(error, OSError) and error.errno not in OF_THE_CHECKPOINT:\n",
        "    if False:\n",
        "checkpoint/test_recovery.py::test_a_read_that_goes_on_failing_is_no_damage",
    ),
    Mutation(
        "a rank whose save has ended goes through fewer places",
        "checkpoint/saver.py",
        "            self._end()\n        outcomes,",
        "            self.wait()\n        outcomes,",
        "checkpoint/test_saver.py::test_a_rank_goes_through_the_same_places_whenever_its_save_ends",
    ),
    Mutation(
        "the manifest is believed without COMPLETE's checksum",
        "checkpoint/checkpoint.py",
        "    if hashlib.sha256(text).hexdigest() != expected:\n",
        "    if not expected:\n",
        f"{DAMAGE}::test_a_changed_or_missing_manifest_is_refused",
    ),
    Mutation(
        "a file that the manifest does not know is loaded",
        "checkpoint/checkpoint.py",
        '            found += [f"{name} is not in the manifest" for name in sorted(present.difference(manifest))]\n',
        "            sorted(present.difference(manifest))\n",
        f"{DAMAGE}::test_a_tokenizer_file_that_the_manifest_does_not_know_is_refused",
    ),
    Mutation(
        "a manifest leads out of the checkpoint",
        "checkpoint/checkpoint.py",
        "        if not path.is_relative_to(root) or os.path.realpath(path) != str(path):\n",
        "        if not path.exists():\n",
        f"{DAMAGE}::test_path_traversal_in_the_manifest_is_refused {DAMAGE}::test_symbolic_links_are_refused",
    ),
    # Which one is taken, which ones are kept
    Mutation(
        "a damaged checkpoint is taken",
        "checkpoint/recovery.py",
        "    return next((found for found in ranks.each(look, (MoeLmError,)) if found is not None), None)\n",
        "    return next((found for found in ranks.each(look, (MoeLmError,)) if not found), None)\n",
        "checkpoint/test_recovery.py",
    ),
    Mutation(
        "checkpoint.on_damage is ignored",
        "checkpoint/recovery.py",
        '    elif found.damaged and on_damage == "stop":\n',
        "    elif False:\n",
        "checkpoint/test_recovery.py::test_by_choice_damage_is_an_error",
    ),
    Mutation(
        "a run of which only damaged checkpoints are left begins anew",
        "checkpoint/recovery.py",
        "        if found.damaged or aside:\n",
        "        if False:\n",
        "checkpoint/test_recovery.py::test_a_run_of_which_only_damaged_ones_are_left_does_not_begin_anew",
    ),
    Mutation(
        "an upload is whole before its files are there",
        "checkpoint/bucket.py",
        "if item.is_complete and step > newest)",
        "if step > newest)",
        "train/test_bucket_runs.py::test_a_run_whose_machine_is_lost_goes_on_from_the_bucket_to_the_bit",
    ),
    Mutation(
        "cleaning deletes the newest",
        "checkpoint/retain.py",
        "good[-keep:])",
        "good[:keep])",
        "checkpoint/test_checkpoint.py::test_clean_keeps_the_newest_and_removes_leftovers",
    ),
    Mutation(
        "cleaning deletes the best",
        "checkpoint/retain.py",
        "    return stay if lowest is None else stay | {lowest}\n",
        "    return stay\n",
        "checkpoint/test_retain.py::test_cleaning_keeps_the_best_beyond_the_newest",
    ),
    Mutation(
        "cleaning deletes an archived one",
        "checkpoint/retain.py",
        "    stay |= {step for step, of in known.items() if of.is_pinned}\n",
        "",
        "train/test_best.py::test_archived_checkpoints_stay_for_good",
    ),
    Mutation(
        "a doubtful checkpoint counts as a good one",
        "checkpoint/checkpoint.py",
        "if not (complete[step] / DOUBTFUL).is_file()]",
        "]",
        "checkpoint/test_retain.py::test_a_doubtful_checkpoint_is_never_the_best train/test_rollbacks.py",
    ),
    Mutation(
        "the best is the one with the highest loss",
        "checkpoint/retain.py",
        "return min(measured,",
        "return max(measured,",
        "checkpoint/test_retain.py",
    ),
    Mutation(
        "the newest gives way on a full disk",
        "checkpoint/retain.py",
        "    for step in [*doubtful, *good][:-1]:\n",
        "    for step in [*doubtful, *good]:\n",
        "checkpoint/test_retain.py::test_room_is_made_one_by_one_and_the_newest_stays",
    ),
    Mutation(
        "a doubtful checkpoint stays instead of the newest good one on a full disk",
        "checkpoint/retain.py",
        "    for step in [*doubtful, *good][:-1]:\n",
        "    for step in sorted(complete)[:-1]:\n",
        "checkpoint/test_retain.py::test_doubtful_ones_give_way_first_and_the_newest_good_one_stays",
    ),
    Mutation(
        "a rollback believes a doubtful checkpoint",
        "checkpoint/recovery.py",
        "    if good:\n",
        "    if False:\n",
        "train/test_rollbacks.py::test_an_interrupted_run_goes_back_as_the_uninterrupted_one",
    ),
    Mutation(
        "a rollback ignores checkpoint.on_damage",
        "train/checkpoints.py",
        "newest_sound(self.folder, self.config.on_damage, good=True)",
        "newest_sound(self.folder, good=True)",
        "train/test_rollbacks.py::test_by_choice_damage_that_a_rollback_finds_ends_the_run",
    ),
    # Reading
    Mutation(
        "2 GB are allocated before the header's length is looked at",
        "checkpoint/safetensors_file.py",
        "        if length > most:  # before anything is allocated for it\n",
        "        bytearray(min(length, 2_000_000_000))\n        if length > most:\n",
        HEADER,
    ),
    Mutation(
        "a header may be larger than 100 MB",
        "checkpoint/safetensors_file.py",
        "        most = min(MOST_HEADER, max(0, size - 8))\n",
        "        most = max(0, size - 8)\n",
        HEADER,
    ),
    Mutation(
        "a foreign folder's links are followed",
        "common/files.py",
        "        place = _blob(path) or path if path.is_symlink() else path\n"
        "        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)\n",
        "        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)\n",
        "common/test_files.py",
    ),
    Mutation(
        "a checkpoint weighs half of the one before it",
        "tools/merge.py",
        "[2.0 ** (i - count)",
        "[2.0 ** (count - i)",
        "tools/test_merge.py::test_exponential_weights_double",
    ),
)
