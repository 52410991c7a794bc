"""Shows that the trials can fail: plants one defect after another into a copy of the source and expects red.

``python -m tests.seeded_defects`` runs all of them (``R1 S4`` those of the rows named), and notes in
``tests/trials.json`` which row was seen red on what.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "trials.json"
PACKAGE = Path("src") / "bco_lightning"


@dataclass(frozen=True)
class Defect:
    """A change of one place in the source, and the trial that must not survive it.

    Args:
        row: Row of the table.
        what: The defect, in words.
        file: File, from ``src/bco_lightning``.
        old: Text that occurs there once.
        new: What takes its place.
        trial: Arguments of pytest that choose the trial.
    """

    row: str
    what: str
    file: str
    old: str
    new: str
    trial: tuple[str, ...]


RESUME, WHOLE = "tests/reliability/test_resume.py", "tests/reliability/test_whole_checkpoints.py"
GUARD, STOP = "tests/reliability/test_finite_guard.py", "tests/reliability/test_preemption.py"
SAME, CHECKPOINTS = "tests/reliability/test_same_numbers.py", "tests/security/test_checkpoints.py"

DEFECTS = [
    Defect(
        "R1", "the reward shift is not restored", "module.py",
        'self.reward_shift.load_state_dict(checkpoint["reward_shift"])', "pass",
        (f"{RESUME}::test_a_resumed_run_ends_as_the_uninterrupted_one", "--trial=(11, 0, 1)"),
    ),
    Defect(
        "R1", "random numbers are not restored", "callbacks/run_checkpoint.py",
        "set_random_state(self._random_states[trainer.global_rank])", "pass",
        (f"{RESUME}::test_other_kinds_of_runs_resume_too[random numbers]",),
    ),
    Defect(
        "R1", "a validation that was due is skipped", "callbacks/run_checkpoint.py",
        'if trainer.enable_validation and checkpoint.get("validation_due"):', "if False:",
        (f"{RESUME}::test_a_resumed_run_ends_as_the_uninterrupted_one", "--trial=(12, 0, 1)"),
    ),
    Defect(
        "R1", "metrics gathered before the stop are lost", "callbacks/implicit_reward_monitor.py",
        'self._metrics["train"].take_over(self._resumed)', "pass",
        (f"{RESUME}::test_a_resumed_run_ends_as_the_uninterrupted_one", "--trial=(13, 0, 1)"),
    ),
    Defect(
        "R2", "the position is the epoch's start", "data/order.py",
        "first = self._current_step()", "first = self._current_step() // self._steps_per_epoch * self._steps_per_epoch",
        (f"{RESUME}::test_no_row_is_lost_or_repeated",),
    ),
    Defect(
        "R3", "the order depends on the number of workers", "data/training.py",
        "options.row_seed, by_class=by_class,", "options.num_workers, by_class=by_class,",
        (f"{RESUME}::test_the_rows_of_a_step_do_not_depend_on_plumbing",),
    ),
    Defect(
        "R4", "a mean of the class means of micro-batches", "objectives/bco.py",
        "return (torch.where(thumbs_up_B, up, down) * losses_B).mean()",
        "return torch.stack([losses_B[m].mean() for m in (thumbs_up_B, ~thumbs_up_B) if m.any()]).sum()",
        (f"{SAME}::test_the_cut_of_a_step_does_not_change_the_trajectory",),
    ),
    Defect(
        "R4", "the shift moves with the first micro-batch alone", "callbacks/step_callback.py",
        "_sums_of_rewards(module.step_rows)", "_sums_of_rewards(module.step_rows[:1])",
        (f"{SAME}::test_the_cut_of_a_step_does_not_change_the_trajectory",),
    ),
    Defect(
        "R5", "micro-batches are not counted anew", "callbacks/run_checkpoint.py",
        "_recut(progress, then, trainer.accumulate_grad_batches)", "pass",
        (f"{RESUME}::test_a_run_goes_on_with_another_number_of_processes", "--trial=((2, 'ddp'), (1, ''), 5, 'steps')"),
    ),
    Defect(
        "R6", "the folder is filled under its own name, as by a move between file systems", "checkpoints/folders.py",
        "        partial.rename(target)\n",
        "        import time\n        target.mkdir()\n        for path in sorted(partial.iterdir()):\n"
        "            time.sleep(0.01)\n            shutil.move(path, target / path.name)\n",
        (f"{WHOLE}::test_a_killed_writer_leaves_the_newest_whole_checkpoint",),
    ),
    Defect(
        "R7", "the folder is renamed before it is flushed", "checkpoints/folders.py",
        "        for path in (*partial.rglob(\"*\"), partial):\n            _flush(path)\n",
        "        partial.rename(target)\n        for path in (*target.rglob(\"*\"), target):\n            _flush(path)\n"
        "        return\n",
        (f"{WHOLE}::test_a_fault_at_any_point_of_a_save_leaves_the_previous_step",),
    ),
    Defect(
        "R8", "digests are not compared", "checkpoints/manifest.py",
        'and digest_of_file(path) != facts["sha256"]:', "and False:",
        (f"{WHOLE}::test_a_damaged_file_is_refused_and_the_step_before_is_taken",),
    ),
    Defect(
        "R9", "signals are left to Lightning", "callbacks/run_checkpoint.py",
        "        self._signals.install()\n", "",
        (f"{STOP}::test_a_signal_at_any_moment_keeps_the_work",),
    ),
    Defect(
        "R10", "a process decides alone", "callbacks/finite_guard.py",
        "if not summary.totals[\"not_finite\"]:", "if not _findings(trainer, module):",
        (f"{GUARD}::test_a_value_that_is_not_finite_stops_all_processes", "--trial=('loss', nan, 0, 1, 'ddp')"),
    ),
    Defect(
        "R10", "only the loss is looked at", "callbacks/finite_guard.py",
        '_SCORES = ("policy_log_probs_B", "reference_log_probs_B", "losses_B")', '_SCORES = ("losses_B",)',
        (f"{GUARD}::test_a_value_that_is_not_finite_stops_all_processes", "--trial=('reference log-probs', inf, 0, 1, 'ddp')"),
    ),
    Defect(
        "R11", "a sum that is not finite is taken in", "objectives/baselines.py",
        "if not all(map(math.isfinite, sums)):", "if False:",
        (f"{GUARD}::test_the_shift_is_right_or_unchanged",),
    ),
    Defect(
        "R12", "a collective is called by processes with thumbs-up only", "callbacks/step_callback.py",
        "    totals = _sum_over_ranks", "    if not float(told[\"num_up\"]):\n        return\n    totals = _sum_over_ranks",
        (f"{GUARD}::test_processes_that_see_one_class_each_stay_together", "--trial=13"),
    ),
    Defect(
        "R13", "NaN becomes 0", "metrics.py",
        "mean = {name: values_C / rows_C for", "mean = {name: torch.nan_to_num(values_C / rows_C) for",
        (f"{SAME}::test_logged_metrics_are_those_of_the_rows",),
    ),
    Defect(
        "R14", "policy and reference share weights", "reference/model.py",
        "model = copy.deepcopy(self.policy)", "model = copy.copy(self.policy)",
        (f"{SAME}::test_the_reference_stays_as_it_was",),
    ),
    Defect(
        "R15", "an unseeded shuffle", "data/order.py",
        "np.random.default_rng([*self._seed, number])", "np.random.default_rng()",
        (f"{SAME}::test_the_same_seed_gives_the_same_run",),
    ),
    Defect(
        "R16", "class weights off by 0.1 %", "objectives/bco.py",
        "return (1 / share_up if share_up else 0.0)", "return (1.001 / share_up if share_up else 0.0)",
        (f"{SAME}::test_the_golden_trajectory",),
    ),
    Defect(
        "R18", "no digest of the tokenizer", "module.py",
        '"tokenizer": digest_of_tokenizer(self.tokenizer),', '"tokenizer": "",',
        (f"{RESUME}::test_changed_inputs_are_noticed",),
    ),
    Defect(
        "R19", "a failed write is passed over", "checkpoints/format.py",
        "        raise CheckpointError(str(target), problem, remedy) from error\n", "        return\n",
        (f"{WHOLE}::test_a_full_disk_leaves_earlier_steps_whole",),
    ),
    Defect(
        "R20", "old steps are removed first", "checkpoints/folders.py",
        "if whole >= keep:", "if whole >= 1:",
        (f"{WHOLE}::test_there_are_never_fewer_than_two_whole_steps",),
    ),
    Defect(
        "R21", "the timeout is Lightning's half hour", "cli/run.py",
        "timedelta(seconds=options.process_timeout)", "timedelta(minutes=30)",
        (f"{STOP}::test_no_process_waits_for_ever", "--trial=('sleeps', 0)"),
    ),
    Defect(
        "R23", "a graph is kept at each step", "module.py",
        "        self.step_rows += [rows] if share else []\n",
        "        self.step_rows += [rows] if share else []\n        self.__dict__.setdefault('kept', []).append(losses_B)\n",
        (f"{SAME}::test_memory_and_open_files_do_not_grow_with_steps",),
    ),
    Defect(
        "R24", "weights are exported under the names of a wrapper", "module.py",
        'module.load_state_dict(checkpoint["state_dict"], strict=False)',
        'module.load_state_dict({f"_orig.{k}": v for k, v in checkpoint["state_dict"].items()}, strict=False)',
        (f"{SAME}::test_an_exported_model_gives_the_logits_of_the_policy",),
    ),
    Defect(
        "S1", "files are unpickled", "checkpoints/manifest.py",
        "    if path.is_file():\n", "    if path.is_file():\n        __import__('torch').load(path, weights_only=False)\n",
        (f"{CHECKPOINTS}::test_no_reader_runs_code_out_of_a_checkpoint",),
    ),
    Defect(
        "S10", "links are followed", "checkpoints/manifest.py",
        "    if folder.is_symlink():\n", "    if False:\n",
        (f"{CHECKPOINTS}::test_a_checkpoint_that_leads_elsewhere_is_refused",),
    ),
    Defect(
        'S4', 'the allow-list is applied after parsing', 'cli/run.py',
        '        with safety.safe_parsing():\n            super().parse_arguments(parser, args)\n',
        '        super().parse_arguments(parser, args)\n        with safety.safe_parsing():\n',
        ('tests/security/test_config_imports.py::test_a_hostile_config_imports_nothing',),
    ),
    Defect(
        'S4', 'denied names alone are refused', 'cli/safety.py',
        'import_path_denylist=["*", *sorted(_granted_before - granted)]',
        'import_path_denylist=[*sorted(_granted_before - granted)]',
        ('tests/security/test_config_imports.py::test_a_hostile_command_line_imports_nothing',),
    ),
    Defect(
        'S5', 'an alias counts as one node', 'cli/plain_yaml.py',
        'nodes += sizes.get(event.anchor, 1)',
        'nodes += 1',
        ('tests/security/test_config_yaml.py::test_a_yaml_bomb_is_refused_at_once',),
    ),
    Defect(
        'S5', 'nested and inline texts are not measured', 'cli/safety.py',
        '            set_loader("yaml", plain_yaml.load_without_secrets, exceptions=(yaml.YAMLError,))\n            try:',
        '            try:',
        ('tests/security/test_config_yaml.py::test_every_text_is_measured',),
    ),
    Defect(
        'S11', 'secrets in a config are not looked for', 'cli/plain_yaml.py',
        '    _refuse_secrets_of(value, where)\n    _refuse_keys',
        '    _refuse_keys',
        ('tests/security/test_secrets.py::test_a_secret_that_is_written_down_is_refused_and_not_shown',),
    ),
    Defect(
        'S11', 'a traceback shows the environment', 'cli/app.py',
        '        fault = in_words(error)\n        print(f"error:',
        '        fault = in_words(error)\n        print(dict(os.environ), file=sys.stderr)\n        print(f"error:',
        ('tests/security/test_secrets.py::test_secrets_of_the_environment_are_written_nowhere',),
    ),
    Defect(
        'S12', 'predictions hold the prompt', 'callbacks/prediction_writer.py',
        '"source": labels[sources[row]], "thumbs_up"', '"source": table["prompt"][row], "thumbs_up"',
        ('tests/security/test_secrets.py::test_what_users_wrote_is_written_nowhere',),
    ),
    Defect(
        'S3', 'remote code is asked for, not refused', 'models/refusals.py',
        '    config = AutoConfig.from_pretrained(location, trust_remote_code=False)',
        '    config = AutoConfig.from_pretrained(location)',
        ('tests/security/test_remote_code.py::test_code_of_a_model_folder_is_refused',),
    ),
    Defect(
        'S3', 'a config may run code of its folder', 'models/refusals.py',
        '    config = AutoConfig.from_pretrained(location, trust_remote_code=False)',
        '    config = AutoConfig.from_pretrained(location, trust_remote_code=True)',
        ('tests/security/test_remote_code.py::test_code_of_a_model_folder_is_refused',),
    ),
    Defect(
        'S3', 'a pickled adapter is read', 'models/refusals.py',
        '    if not (folder / "adapter_model.safetensors").exists():\n',
        '    if False:\n',
        ('tests/security/test_remote_code.py::test_pickled_weights_are_refused',),
    ),
    Defect(
        'S10', 'places in a config are not looked at', 'cli/safety.py',
        '    if _leads_out(text, Path.cwd().resolve()):\n',
        '    if False:\n',
        ('tests/security/test_paths.py::test_a_config_cannot_write_outside',),
    ),
    Defect(
        'S3', 'a saved config sets trust_remote_code', 'models/refusals.py',
        '    config = AutoConfig.from_pretrained(location, trust_remote_code=False)',
        '    config = AutoConfig.from_pretrained(\n        location, trust_remote_code=\'"trust_remote_code": true\' in (Path(location) / "config.json").read_text()\n    )',
        ('tests/security/test_remote_code.py::test_code_of_a_model_folder_is_refused',),
    ),
    Defect(
        'S13', 'lower bounds let malicious releases in', '../../pyproject.toml',
        '"lightning>=2.6.6,<2.7,!=2.6.2,!=2.6.3"',
        '"lightning>=2.6,<2.7"',
        ('tests/security/test_supply_chain.py::test_bad_releases_are_refused',),
    ),
    Defect(
        'S6', 'a line is read whole, however long', 'data/records/strict_json.py',
        '        while line := file.readline(MAX_LINE_BYTES + 1):\n',
        '        while line := file.readline():\n',
        ('tests/security/test_data_bombs.py::test_a_malformed_line_is_refused_quickly_and_in_little_memory',),
    ),
    Defect(
        'S6', '1e999 is a number', 'data/records/strict_json.py',
        'parse_float=_finite, ',
        '',
        ('tests/security/test_data_bombs.py::test_a_malformed_line_is_refused_quickly_and_in_little_memory',),
    ),
    Defect(
        'S7', 'errors of the parser escape', 'data/records/strict_json.py',
        '    except ValueError as error:\n        return FeedbackRowError(place, f"expected {error}.")\n    if not isinstance(record, dict):',
        '    if not isinstance(record, dict):',
        ('tests/security/test_data_fuzzing.py::test_any_line_gives_a_row_or_a_clear_error',),
    ),
    Defect(
        'S7', 'texts are stripped', 'data/formats/record_format.py',
        '            return [{"role": role, "content": value}]\n',
        '            return [{"role": role, "content": value.strip()}]\n',
        ('tests/security/test_data_fuzzing.py::test_a_written_row_is_read_back_the_same',),
    ),
    Defect(
        'S8', 'labels are compared by truth', 'data/labels.py',
        '    return type(label), label  # as True',
        '    return label  # as True',
        ('tests/security/test_data_labels.py::test_a_mixture_of_vocabularies_is_refused',),
    ),
    Defect(
        'S8', 'vocabularies may be mixed', 'data/labels.py',
        '        self.candidates = matching\n',
        '',
        ('tests/security/test_data_labels.py::test_a_mixture_of_vocabularies_is_refused',),
    ),
    Defect(
        'S9', 'the template is put on raw text', 'data/chat.py',
        'told = self._control.shield(Conversation(row.prompt + row.completion, row.tools, row.template_options))\n',
        'told = Conversation(row.prompt + row.completion, row.tools, row.template_options)\n',
        ('tests/security/test_data_control_tokens.py::test_typed_control_tokens_are_text',),
    ),
    Defect(
        'S9', 'control tokens are parsed in user text', 'data/control_tokens.py',
        '        other.encode_special_tokens = True\n',
        '',
        ('tests/security/test_data_control_tokens.py::test_typed_control_tokens_of_the_real_tokenizer_are_text',),
    ),
    Defect(
        'S14', 'a sample may have no completion token', 'data/tokenize.py',
        '        is_whole = num_completion <= room and not first\n',
        '        is_whole = True\n',
        ('tests/security/test_data_bombs.py::test_no_sample_is_without_completion_tokens',),
    ),
    Defect(
        'S14', "no limit on a row's characters", 'data/messages.py',
        'MAX_ROW_CHARACTERS = 1_000_000\n',
        'MAX_ROW_CHARACTERS = 10**9\n',
        ('tests/security/test_data_bombs.py::test_a_costly_row_is_decided_quickly',),
    ),
    Defect(
        'S15', 'contradictions are not counted', 'data/table.py',
        '            contradictions=len(np.intersect1d(up, down, assume_unique=True)),\n',
        '            contradictions=0,\n',
        ('tests/security/test_data_poisoning.py::test_poisoned_feedback_is_visible',),
    ),
    Defect(
        'R17', 'errors of rows are swallowed', 'data/row_sets.py',
        '                            raise FeedbackRowError(row.where, row.problem, f"{row.remedy} {SEE_ALL}".lstrip())\n',
        '                            continue\n',
        ('tests/reliability/test_bad_rows.py::test_strict_names_the_malformed_row',),
    ),
    Defect(
        'R17', 'no limit on the share of malformed rows', 'data/row_sets.py',
        '        if bad.count > max(share * read, few := self._options.few_bad_rows):\n',
        '        if bad.count > max(read, few := self._options.few_bad_rows):\n',
        ('tests/reliability/test_bad_rows.py::test_skip_stops_above_the_share',),
    ),
    Defect(
        'R17', 'reading ends at the first malformed row', 'data/row_sets.py',
        '                if isinstance(row, FeedbackRowError) and self._options.bad_rows == "strict":\n',
        '                if isinstance(row, FeedbackRowError):\n',
        ('tests/reliability/test_bad_rows.py::test_skip_leaves_out_exactly_the_malformed_rows',),
    ),
    Defect(
        'R25', 'a run is trained without a lock', 'checkpoints/runs.py',
        '        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n',
        '        pass\n',
        ('tests/reliability/test_run_folders.py::test_a_run_is_trained_by_one_process',),
    ),
    Defect(
        'R9', 'signals are heard from training on alone', 'cli/app.py',
        '        early.leave_at_once()\n',
        '',
        ('tests/reliability/test_preemption.py::test_a_signal_before_the_first_step_ends_in_words_and_keeps_what_was_computed',),
    ),
    Defect(
        'R19', 'events that cannot be written end a run that may go on', 'callbacks/loggers.py',
        '        if fault is None:\n            raise\n',
        '        raise\n',
        ('tests/reliability/test_whole_checkpoints.py::test_a_truly_full_disk_is_met_in_words',),
    ),
    Defect(
        'R22', 'all rows are held in memory', 'data/row_sets.py',
        'outcomes = self.row_tokenizer.tokenize(row for row, _ in self._read(files, maker))',
        'outcomes = iter(list(self.row_tokenizer.tokenize(row for row, _ in self._read(files, maker))))',
        ('tests/reliability/test_bounded_memory.py::test_memory_does_not_grow_with_the_log',),
    ),
    Defect(
        'S3', 'an adapter may ask PEFT for anything', 'models/refusals.py',
        '        if is_nested or is_other:\n',
        '        if False:\n',
        ('tests/security/test_remote_code.py::test_what_an_adapter_asks_for_besides_is_refused', '--full-trials'),
    ),
    Defect(
        'S3', 'a model may ask for kernels of the hub', 'models/refusals.py',
        '        elif key.endswith("_implementation") and ', '        elif False and ',
        ('tests/security/test_remote_code.py::test_what_a_model_asks_for_besides_is_refused', '--trial=a kernel of the hub'),
    ),
    Defect(
        'S16', 'whose a cache is does not matter', 'places.py',
        '    return stat.S_ISDIR(status.st_mode) and is_ours\n', '    return stat.S_ISDIR(status.st_mode)\n',
        ('tests/security/test_planted_caches.py::test_planted_log_probs_are_passed_over', '--full-trials'),
    ),
    Defect(
        'S17', 'moments are taken as they are', 'checkpoints/optimizers.py',
        '(found.shape, found.dtype) != (own.shape, own.dtype):\n', 'False:\n',
        ('tests/security/test_checkpoints.py::test_hostile_moments_do_not_reach_the_optimizers_kernels',),
    ),
    Defect(
        'S18', 'what is packed is not measured', 'data/records/swelling.py',
        '    if size > _ALWAYS_BYTES and ', '    if False and ',
        ('tests/security/test_data_bombs.py::test_a_small_file_that_swells_is_refused', '--trial=packed text'),
    ),
    Defect(
        'S19', 'errors are printed as they are', 'errors.py',
        'printable(problem), printable(remedy)', 'problem, remedy',
        ('tests/security/test_terminal.py::test_escapes_do_not_reach_the_terminal', '--full-trials'),
    ),
]  # fmt: skip


def is_seen(defect: Defect) -> bool:
    """Runs the trial on a copy of the source with the defect in it, and tells whether it failed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        left_out = shutil.ignore_patterns("__pycache__", ".*", "runs", "exports")
        shutil.copytree(ROOT, copy, ignore=left_out)
        file = copy / PACKAGE / defect.file
        text = file.read_text(encoding="utf-8")
        if text.count(defect.old) != 1:
            raise SystemExit(
                f"{defect.row}: expected {defect.old!r} once in {defect.file}, found {text.count(defect.old)}"
            )
        file.write_text(text.replace(defect.old, defect.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *defect.trial]
        environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}:{copy}", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{defect.row}: the trial could not be run\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main(rows: list[str]) -> int:
    chosen = [defect for defect in DEFECTS if not rows or defect.row in rows]
    unseen = 0
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for defect, seen in zip(chosen, pool.map(is_seen, chosen), strict=True):
            print(f"{defect.row:4} {'red  ' if seen else 'GREEN'} {defect.what}", flush=True)
            known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            known.setdefault(defect.row, {}).setdefault("red", {})[defect.what] = seen
            RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            unseen += not seen
    return unseen


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
