"""A run from settings to report: what ``lioncub train`` does once its flags are understood."""

import os
import shutil
from pathlib import Path

from lioncub.training import checkpoint
from lioncub.training.config import ERROR_NAME, TrainConfig, UserError
from lioncub.training.gpt import GPT, parameter_count
from lioncub.training.launch import run_workers
from lioncub.training.log import LOG_NAME, read_log
from lioncub.training.loop import TrainJob
from lioncub.training.plots import PLOT_NAMES, write_plots
from lioncub.training.progress import shown_progress
from lioncub.training.report import SUMMARY_NAME, print_report
from lioncub.training.summary import summarize
from lioncub.training.text import load_text
from lioncub.training.worker import run_joined


def train(config: TrainConfig, *, resume: bool, overwrite: bool, joined: bool) -> None:
    """Train, then print the table and write the plots.

    Args:
        config: settings; results go to `config.out`.
        resume: continue from the newest checkpoint in `config.out`.
        overwrite: replace an earlier run in `config.out`.
        joined: this process is one worker of a group that torchrun started; otherwise the workers are started here.

    Raises:
        UserError: bad settings, text or folder.
        WorkerFailedError: a worker failed.
    """
    directory = Path(config.out)
    # told here, before any process is started
    load_text(config.data, config.context)
    leads = not joined or os.environ["RANK"] == "0"
    if leads:
        prepare_folder(directory, config, resume=resume, overwrite=overwrite)
    job = TrainJob(config, resume)
    if not leads:
        run_joined(job, lambda record: None)
        return
    newest = checkpoint.latest(directory) if resume else None
    if resume and newest is None:
        raise UserError(f"--resume {directory}: there is no complete checkpoint")
    done = checkpoint.read_position(newest).step if newest is not None else 0
    with shown_progress(config, done) as on_record:
        if joined:
            run_joined(job, on_record)
        else:
            run_workers(job, on_record)
    report(config)


def prepare_folder(directory: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Make the folder of a run and store its settings.

    Raises:
        UserError: it cannot be written, or holds an earlier run and neither `resume` nor `overwrite` is set.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / LOG_NAME).exists() and not resume:
            if not overwrite:
                raise UserError(
                    f"--out {directory}: expected a folder without a run; continue that one with --resume {directory},"
                    " replace it with --overwrite, or name another"
                )
            for name in (LOG_NAME, SUMMARY_NAME, *PLOT_NAMES):
                (directory / name).unlink(missing_ok=True)
            shutil.rmtree(directory / checkpoint.FOLDER, ignore_errors=True)
        (directory / ERROR_NAME).unlink(missing_ok=True)
        if not resume:
            (directory / "config.json").write_text(config.to_json(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be written: {error.strerror}") from error


def report(config: TrainConfig) -> None:
    """Table and plots of a finished run, from its log."""
    directory = Path(config.out)
    records = read_log(directory)
    model = GPT(layers=config.layers, heads=config.heads, width=config.width, context=config.context)
    print_report([summarize(records, method) for method in config.methods], config, parameter_count(model))
    written = write_plots(records, directory)
    print(f"{directory}: {LOG_NAME}, {SUMMARY_NAME}, {', '.join(path.name for path in written)}")
