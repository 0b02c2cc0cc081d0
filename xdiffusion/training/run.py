"""A run from its first step to its last: its folder, what it writes, how it is stopped, goes back, and goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.writing import ensure_writable, remove_leftovers, write_text
from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.memory import TAKES_LESS, is_full_memory
from xdiffusion.model import ImagesNotFinite
from xdiffusion.places import OUTPUT_ROOT
from xdiffusion.training.divergence import TrainingDiverged, write_report
from xdiffusion.training.folder_lock import held
from xdiffusion.training.interruption import Interruption, resuming_command
from xdiffusion.training.loop import StepMetrics, Trainer, averaged, fit
from xdiffusion.training.processes import LostProcess, check_same_everywhere, largest, noticing_lost_processes
from xdiffusion.training.records import Records, begin_with_metrics_of
from xdiffusion.training.run_record import RunRecord
from xdiffusion.training.state import RunCheckpoints

# what may befall a run that is not at fault, beside a full memory: diverging, other processes, disks, data
FAULTS = (TrainingDiverged, LostProcess, OSError, ValueError)
Draw = Callable[[Path | None, str], Image.Image]  # (where to write it, title) -> a picture of what the model can


def run_folder(config: DictConfig, config_path: str, output_path: str | None, *, lora: bool) -> Path:
    """The folder of a run, made and seen to be writable.

    output/<dataset>/<config name>, for a LoRA run output/<dataset>/<config name>/lora, unless output_path names it.

    Raises:
        CheckpointError: if it cannot be written.
    """
    folder = Path(output_path) if output_path else OUTPUT_ROOT / config.data.kind / Path(config_path).stem
    if lora and not output_path:
        folder = folder / "lora"
    return ensure_writable(folder)


def begin(trainer: Trainer, checkpoints: RunCheckpoints, config: DictConfig, command: list[str], first_step: int) -> RunRecord:
    """Prepare the folder of a run that is about to take its first step: clean up, config.yaml, run.json.

    The first process alone writes; the record of another one is kept nowhere. The trainer draws the noise of run.json.
    """
    folder, origin = checkpoints.folder, checkpoints.origin
    writes, moved = trainer.accelerator.is_main_process, origin != folder
    if writes:
        for place in (folder, folder / "samples"):
            remove_leftovers(place)
        checkpoints.clear_cut_short()
        none_left = first_step > trainer.settings.num_training_steps  # so that nothing is replaced
        earlier = [] if none_left and not moved else checkpoints.set_aside(after=0 if moved else first_step - 1)
        if earlier and (moved or first_step == 1):
            print(
                f"{folder} holds an earlier run up to step {earlier[-1]}: its states are set aside; its metrics.jsonl, "
                "run.json and weights of the same steps are replaced; --resume_from auto would have gone on with it",
                file=sys.stderr,
            )
        elif earlier:
            print(
                f"{folder} holds later steps, up to {earlier[-1]}: their states are set aside, their lines leave metrics.jsonl",
                file=sys.stderr,
            )
        if moved or first_step == 1:
            last = max(trainer.settings.num_training_steps, first_step - 1)  # a resumed one is copied here, too
            steps = range(max(1, first_step - 1), last + 1)
            checkpoints.set_weights_aside(lambda step: step in steps and trainer.settings.is_due(step))
        if moved:
            begin_with_metrics_of(origin, folder)
    device, processes = trainer.accelerator.device, trainer.accelerator.num_processes
    base_hash = checkpoints.files.base_hash
    place, task = folder if writes else None, trainer.task
    record = RunRecord(
        place,
        config,
        command,
        task.data,
        device,
        processes,
        first_step,
        base_hash,
        noise=trainer.rollbacks,
        class_images=task.class_images,
        origin=origin,
    )
    trainer.rollbacks = largest(trainer.accelerator, record.noise)  # all draw the noise that the first process knows of
    for change in record.changes:
        print(f"resumed under other conditions: {change}", file=sys.stderr)
    if writes and first_step > 1 and not record.continues:
        print(f"{origin} holds no run.json: whether it was begun under these conditions is not known", file=sys.stderr)
    if writes:  # not `config` where no step is left to take
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(record.content["config"])))
        if isinstance(task.data, CaptionedImages) and task.data.skipped:
            write_text(folder / "skipped.txt", "".join(f"{name}: {reason}\n" for name, reason in task.data.skipped.items()))
    return record


def go_back(trainer: Trainer, checkpoints: RunCheckpoints, record: RunRecord, error: TrainingDiverged) -> int:
    """After a divergence, put the last good checkpoint back and choose other noise; returns the next step.

    The newest may not be good: where it is of the very weights that gave this loss, or the run has been there already and has
    made no newer one since, it goes to the one before, if there is one. What is not good is set aside.

    Raises:
        TrainingDiverged: the same, with its report written, if there is no such checkpoint or training.rollbacks are used up.
    """
    checkpoints.finish()
    writes = trainer.accelerator.is_main_process
    if writes:
        write_report(checkpoints.folder, error)
    trainer.accelerator.wait_for_everyone()  # for what the first process was writing
    diverged, rollbacks = error.report["step"], trainer.rollbacks + 1
    been = record.rollbacks[-1]["to"] if record.rollbacks else None
    newest = checkpoints.newest_step()
    step = (checkpoints.newest_step(before=newest) if newest in (diverged - 1, been) else 0) or newest
    if writes and step != newest:
        print(f"{checkpoints.path(newest)} is not good, its next loss was not: its state is set aside", file=sys.stderr)
    goes_back = step > 0 and rollbacks <= trainer.settings.rollbacks
    if goes_back:
        checkpoints.resume(trainer, str(checkpoints.path(step)))
        check_same_everywhere(trainer.accelerator, {"checkpoint": checkpoints.resumed})
    trainer.accelerator.wait_for_everyone()  # before the states of later steps have other names
    if writes:
        checkpoints.set_aside(after=step)
    if not goes_back:
        raise error
    record.rolled_back(diverged, step, rollbacks)
    trainer.rollbacks = rollbacks
    return step + 1


def train(
    trainer: Trainer,
    checkpoints: RunCheckpoints,
    config: DictConfig,
    draw: Draw,
    *,
    script: str,
    words: Sequence[str],
    resume_from: str | None,
) -> int:
    """Take the steps and keep run.json; where they end early, say why and how to go on.

    Args:
        draw: the picture that a run makes of itself at each checkpoint, from the averaged weights.
        script, words: the command line.
        resume_from: see `RunCheckpoints.resume`; None begins anew.

    Returns:
        The exit status: 0, 1 where the run diverged or failed, 128 + the number of the signal that stopped it.

    Raises:
        CheckpointError: if another run is in the folder, or there is nothing to resume from.
    """
    named = resume_from not in (None, "auto")  # a file that is none is said before the folder is made
    first_step = 1 + (checkpoints.resume(trainer, resume_from) if named else 0)
    with held(checkpoints.folder) if trainer.accelerator.is_main_process else nullcontext():
        trainer.accelerator.wait_for_everyone()  # a run that ends in this folder may write its last checkpoint until then
        if resume_from == "auto":
            first_step = 1 + checkpoints.resume(trainer, "auto")
        check_same_everywhere(trainer.accelerator, {"checkpoint": checkpoints.resumed})
        if resume_from:
            print(_where_it_goes_on(first_step, checkpoints.folder, trainer.settings.num_training_steps))
        record = begin(trainer, checkpoints, config, [script, *words], first_step)
        steps, warmup = trainer.settings.num_training_steps, trainer.optimizer_settings.warmup_steps
        if warmup >= steps > 1 and first_step <= steps:
            end = f"its learning rate ends at {steps / warmup:.0%} of the peak"
            print(f"optimizer.warmup_steps={warmup} takes all of the {steps} steps: {end}")
        if record.status_before == "diverged":
            print("the run diverged after this step before: going on with other noise")
        go_on = resuming_command(script, words, trainer.accelerator.num_processes)
        with Interruption() as interruption:
            try:
                number = take_steps(trainer, checkpoints, draw, record, first_step, interruption)
                if not number and trainer.accelerator.is_main_process:
                    checkpoints.rotate()
                number = number or largest(trainer.accelerator, interruption.signal)  # at the last picture
            except Exception as error:
                with suppress(CheckpointError):  # a full disk holds no record either
                    record.update("diverged" if isinstance(error, TrainingDiverged) else "failed")
                print(_why_it_stopped(error, record.last_step, checkpoints, go_on), file=sys.stderr)
                is_fault = isinstance(error, FAULTS) or is_full_memory(error)
                if not is_fault or os.environ.get("XDIFFUSION_TRACEBACK"):
                    raise  # a mistake in the code, whose place is to be seen
                return 1
        whole = record.last_step == trainer.settings.num_training_steps
        record.update("finished" if whole or not number else "interrupted")
        if number:
            rest = "the last" if whole else f"to go on: {go_on}"
            print(f"stopped by {signal.Signals(number).name} after step {record.last_step}; {rest}", file=sys.stderr)
        return 128 + number if number else 0


def _why_it_stopped(error: Exception, last_step: int, checkpoints: RunCheckpoints, go_on: str) -> str:
    newest, step = checkpoints.newest(), checkpoints.newest_step()
    last_good = f"{newest}; to go on from it: {go_on}" if newest else "none"
    if newest and isinstance(error, TrainingDiverged) and step == error.report["step"] - 1:
        last_good = f"none for sure, as the step after {newest}, the only one, was this; to try it with other noise: {go_on}"
    reason = " ".join(str(error).split()) or type(error).__name__
    reason += f"; {TAKES_LESS}" if is_full_memory(error) else ""
    return f"error: training stopped after step {last_step}, {reason}; last good checkpoint: {last_good}"


def _where_it_goes_on(first_step: int, folder: Path, last_step: int) -> str:
    if first_step > last_step:
        more = f", and {first_step - 1 - last_step} more" if first_step - 1 > last_step else ""
        return f"the run in {folder} has taken all of its {last_step} steps{more}"
    return f"going on with step {first_step}" if first_step > 1 else f"no checkpoint in {folder} yet: starting afresh"


@noticing_lost_processes()
def take_steps(
    trainer: Trainer,
    checkpoints: RunCheckpoints,
    draw: Draw,
    record: RunRecord,
    first_step: int,
    interruption: Interruption,
) -> int:
    """Train from first_step on, writing what a run writes; go back where it diverges and `training.rollbacks` allows.

    Returns:
        The number of the signal that stopped it, or 0.

    Raises:
        LostProcess: if another process is gone, in a step, a picture or the way back.
    """
    folder, writes = checkpoints.folder, trainer.accelerator.is_main_process
    with Records(folder, first_step, trainer.settings.num_training_steps) if writes else nullcontext() as records:

        def picture_of(step: int) -> Path:
            return folder / "samples" / f"sample-{step}.png"

        def on_step(metrics: StepMetrics) -> None:
            record.last_step = metrics.step
            if writes:
                records.step(metrics)
                checkpoints.raise_failure()

        def on_checkpoint(step: int) -> None:
            if writes:  # a kill would leave an earlier run's picture beside these weights
                picture_of(step).unlink(missing_ok=True)
                record.update()
            checkpoints.save(trainer, step, lambda p: records.say(f"step {step}: {p} ({p.stat().st_size:,} bytes)"))

        def on_sample(step: int) -> None:
            if not (writes or trainer.sharded):  # sharded weights compute in all processes together
                return
            try:
                page, said = draw(picture_of(step) if writes else None, f"step {step}"), str(picture_of(step))
            except ImagesNotFinite as error:  # the loss decides whether the run is lost
                page, said = None, f"no samples: {error}"
            if writes:
                records.sampled(step, page, said)

        callbacks = {"on_step": on_step, "on_checkpoint": on_checkpoint, "on_sample": on_sample}
        if resumed := first_step - 1:
            with averaged(trainer):
                if checkpoints.origin != folder:  # what this folder is resumed from, and gone back to
                    on_checkpoint(resumed)
                if trainer.settings.is_due(resumed) and not picture_of(resumed).is_file():  # killed before its picture
                    on_sample(resumed)
        while True:
            try:
                return fit(trainer, first_step=first_step, signal=lambda: interruption.signal, **callbacks)
            except TrainingDiverged as error:
                first_step = go_back(trainer, checkpoints, record, error)
                if writes:
                    records.go_back(first_step, f"{error}; going on from step {first_step} with other noise")
            finally:
                checkpoints.finish()
