"""Checkpoints of a run: the averaged weights for users, and beside them the state that resumes training exactly.

`diffusion-N.safetensors` (a LoRA run: `diffusion-N-lora.safetensors`) holds what is sampled; `....state.pt` holds the
trained weights without averaging, the average where that file rounds it, the optimizer and the gradient scaler. All draws
follow from the seed and the step.

A checkpoint is whole if its state says so: it carries a hash of all it holds, and one of the weights file's bytes. It is
written after the weights, so a run that is killed in between leaves no state, or one that does not agree with them.

A run that begins anew in a folder puts `.earlier` behind the names of what stands there of another one: of the states of all
its steps, as `auto` and the rotation go by them; and of weights without a state, if the run would replace them, because they
may be the only ones of that training. Those of a checkpoint that was cut short, beside which `....saving` stands until its
state is written, are taken away by the run that goes on, for it takes their steps again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.paths import weights_file
from xdiffusion.checkpoints.writing import write_text
from xdiffusion.training.exports import export_paths
from xdiffusion.training.loop import Trainer
from xdiffusion.training.settings import CheckpointSettings, TrainingSettings
from xdiffusion.training.sharded_weights import host_copy, laid_out_as, local, rows_of
from xdiffusion.training.state_files import aside_path, free_aside, saving_path, state_path, whole_state, write_state
from xdiffusion.training.weights_files import WeightsFiles


class RunCheckpoints:
    """Writes and reads the checkpoints of one run.

    Args:
        folder: of the run (a LoRA run: its `lora` folder).
        files: how its weights are written.

    Attributes:
        origin: the folder of the run that was resumed last; another one where a file of it was named.
        goes_on: whether it is this folder's own run that was resumed, if only from its beginning.
        resumed: what was resumed last, the same in all processes of a run: a step and a hash, or "none".
    """

    def __init__(self, folder: Path, files: WeightsFiles):
        self.folder, self.files = folder, files
        self.origin, self.resumed, self.goes_on = folder, "none", False
        self.kept = CheckpointSettings(**files.config["checkpoints"])
        self.settings = TrainingSettings(**files.config["training"])
        self._writing: Thread | None = None
        self._error: Exception | None = None

    def path(self, step: int) -> Path:
        """The weights file of a step."""
        return self.folder / f"{self.files.prefix}-{step}{self.files.suffix}.safetensors"

    def save(self, trainer: Trainer, step: int, on_saved: Callable[[Path], None] | None = None) -> None:
        """Copy weights (the moving average must be in place) and state of a step; a thread writes them meanwhile.

        Every process calls it, since sharded weights are gathered from all; the first alone copies and writes.

        Args:
            on_saved: called by that thread with the weights' path once both files are on the disk.

        Raises:
            CheckpointError: if the write before this one failed.
        """
        self.finish()
        path, writes = self.path(step), trainer.accelerator.is_main_process
        if writes and not self.settings.is_due(step):  # which no run could tell at its start
            self.set_weights_aside(lambda present: present == step)
        state = host_copy(self._state(trainer, step), writes)
        write_weights = self.files.save(trainer.model, path, step, writes)
        if not writes:
            return

        def write() -> None:
            try:
                try:
                    self.rotate()  # now that the steps since have shown the one before this to be good
                except CheckpointError as error:
                    print(f"damaged checkpoint: {error}; those before it are kept", file=sys.stderr)
                write_text(saving_path(path), "")
                write_weights()
                write_state(path, state)
                for outlived in (saving_path(path), aside_path(path)):  # the second is of weights that are no more
                    outlived.unlink(missing_ok=True)
                if on_saved is not None:
                    on_saved(path)
            except Exception as error:  # raised again where the run will see it
                self._error = error

        self._writing = Thread(target=write, name=f"checkpoint-{step}")
        self._writing.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        if self._writing is not None:
            self._writing.join()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what a write met that has failed meanwhile."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def resume(self, trainer: Trainer, resume_from: str) -> int:
        """Put a saved run back into the trainer; returns its step.

        Args:
            trainer: fresh, of the same config, or one that is to go back.
            resume_from: a weights file, or "auto" for the newest whole one of this folder (step 0 where there is none).

        Raises:
            CheckpointError: if either file is missing or damaged, or belongs to other weights, frozen ones too;
                of "auto", if none is whole of those that stand there.
        """
        if resume_from == "auto":
            found = self._newest_whole()
            self.origin, self.goes_on = self.folder, True
            if found is None:
                self._check_that_it_may_begin()
                return 0
            path, state = found
            averaged = self.files.read(path)
        else:
            path = weights_file(resume_from)
            averaged = self.files.read(path)
            if self.files.start_flag and not (state_path(path).exists() or aside_path(path).exists()):
                alone = f"to begin a run with its weights alone, name {path.name} with {self.files.start_flag}"
                raise CheckpointError(f"no file at {state_path(path)}, without which no run goes on; {alone}")
            state = whole_state(path)
            self.goes_on = path.parent.resolve() == self.folder.resolve()
            self.origin = self.folder if self.goes_on else path.parent
        own_base = self.files.base_hash
        if (base := state.get("base", own_base)) != own_base:
            raise CheckpointError(f"{path} is of another base: {base}, this run's is {own_base}")
        try:
            _check_frozen(trainer.model, averaged)
            average = state.get("average") or {
                name: _trained_part(averaged[_file_name(name)], p) for name, p in trainer.trainable.items()
            }
            _copy_into(trainer.by_name(trainer.ema.average), average)
            _copy_into(trainer.trainable, state["trained"])
            _copy_into(frozen_factors(trainer), state["frozen"])
            trainer.packed.check_groups(state["optimizer"])
            _lay_out_moments(state["optimizer"], trainer.packed.parameters)
            settings = trainer.optimizer.state_dict()["param_groups"]  # of the config, which may say others now
            moments = trainer.packed.packed_state(state["optimizer"])
            trainer.optimizer.load_state_dict(moments | {"param_groups": settings})
            if trainer.accelerator.scaler is not None and state["scaler"]:
                trainer.accelerator.scaler.load_state_dict(state["scaler"])
            trainer.watch.restore(state["losses"])
            trainer.rollbacks = int(state["rollbacks"])
            self.resumed = _said(state)
            return int(state["step"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not belong to this run: {error}") from error

    def weights_to_go_on_from(self, resume_from: str | None) -> tuple[Path | None, str]:
        """The weights file that `resume` would take, or refuse, and what `resumed` will be; None where the run begins anew."""
        named = weights_file(resume_from) if resume_from not in (None, "auto") else None
        of_folder = map(self.path, reversed(self._steps())) if resume_from == "auto" else ()
        for path in [named] if named else of_folder:
            with suppress(CheckpointError):  # `resume` names it
                return path, _said(whole_state(path))
        return named, "none"

    def newest_step(self, before: float = math.inf) -> int:
        """The step of the newest whole checkpoint before a step; 0 where there is none."""
        found = self._newest_whole(before)
        return int(found[1]["step"]) if found else 0

    def newest(self) -> Path | None:
        """The weights file of the newest whole checkpoint."""
        found = self._newest_whole()
        return found[0] if found else None

    def set_aside(self, after: int) -> list[int]:
        """Rename the states of later steps, of another run: `auto` and the rotation see the checkpoints of this one alone.

        Weights stay, and renaming a state back makes it whole again, as long as no new weights have its name.

        Returns:
            The steps.
        """
        later = [step for step in self._states() if step > after]
        for step in later:
            state_path(self.path(step)).replace(aside_path(self.path(step)))
        return later

    def set_weights_aside(self, are_replaced: Callable[[int], bool]) -> None:
        """Rename the weights of such steps that have no state, neither beside them nor set aside; say so on stderr."""
        alone = set(self._present()).difference(self._states())
        names = [path.replace(free_aside(path)).name for path in map(self.path, sorted(filter(are_replaced, alone)))]
        if names:
            shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} files)"
            print(f"{self.folder} holds weights without a state that would be replaced: renamed to {shown}", file=sys.stderr)

    def _newest_whole(self, before: float = math.inf) -> tuple[Path, dict[str, Any]] | None:
        """Weights and state of the highest step before that which is whole; what is damaged or lacks one of both above it is
        named on stderr."""
        for step in reversed([step for step in self._present() if step < before]):
            try:
                return self.path(step), whole_state(self.path(step))
            except CheckpointError as error:
                print(f"damaged checkpoint: {error}; trying the one before", file=sys.stderr)
        return None

    def clear_cut_short(self) -> None:
        """Take away what checkpoints that were cut short have left: of a run that goes on their weights too."""
        for weights in map(self.path, self._numbers(".saving")):
            if self.goes_on and not state_path(weights).exists():
                for path in (*export_paths(weights), weights, aside_path(weights)):
                    path.unlink(missing_ok=True)
            saving_path(weights).unlink(missing_ok=True)

    def _check_that_it_may_begin(self) -> None:
        """Raise CheckpointError where a run would begin anew over checkpoints none of which is whole."""
        if present := [step for step in self._present() if not saving_path(self.path(step)).exists()]:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole, of {len(present)} that stand there; to start afresh, move them away"
            )

    def rotate(self) -> None:
        """Delete what checkpoints.keep_last and checkpoints.keep_every do not keep, if the newest is seen to be whole.

        Raises:
            CheckpointError: if it is not.
        """
        last, every = self.kept.keep_last, self.kept.keep_every
        steps = self._steps()
        if not last or not steps:
            return
        kept = {step for step in steps if step in steps[-last:] or (every and step % every == 0)}
        doomed = [step for step in self._states() if step not in kept]  # those without weights too, which a kill leaves
        if doomed:
            whole_state(self.path(steps[-1]))
        for weights in map(self.path, doomed):
            for path in (*export_paths(weights), weights, state_path(weights), aside_path(weights)):
                path.unlink(missing_ok=True)

    def _states(self) -> list[int]:
        """The steps that have a state."""
        return sorted(s for s in self._numbers(".state.pt") if state_path(self.path(s)).is_file())

    def _present(self) -> list[int]:
        """The steps that have a state or weights, without those whose state is set aside."""
        weights = {s for s in self._numbers(".safetensors") if self.path(s).is_file() and not aside_path(self.path(s)).exists()}
        return sorted(weights.union(self._states()))

    def _numbers(self, ending: str) -> set[int]:
        names = (path.name.split("-")[1].split(".")[0] for path in self.folder.glob(f"{self.files.prefix}-*{ending}"))
        return {int(name) for name in names if name.isascii() and name.isdigit()}

    def _steps(self) -> list[int]:
        """The steps that have a state and weights, whole or not."""
        return [step for step in self._states() if self.path(step).is_file()]

    def _state(self, trainer: Trainer, step: int) -> dict[str, Any]:
        scaler = trainer.accelerator.scaler
        return {
            "step": step,
            "base": self.files.base_hash,
            "trained": trainer.by_name(trainer.ema.trained()),
            "average": {n: p.data for n, p in trainer.trainable.items()} if self.files.rounds else None,
            "frozen": frozen_factors(trainer),
            "optimizer": trainer.packed.unpacked_state(trainer.optimizer.state_dict()),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "losses": list(trainer.watch.losses),
            "rollbacks": trainer.rollbacks,
        }


def _said(state: Mapping[str, Any]) -> str:
    return f"step {state['step']}, {state['weights_hash']:.8}"


def frozen_factors(trainer: Trainer) -> dict[str, Tensor]:
    """What a LoRA keeps frozen beside the base: PiSSA's first factors, which an SVD elsewhere would round otherwise."""
    return {n: p.data for n, p in trainer.model.named_parameters() if ".lora_" in n and not p.requires_grad}


def _check_frozen(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the model has other weights than a file in a part that is not trained."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name in stored and not torch.equal(parameter.cpu(), stored[name]):
            raise ValueError(
                f"its frozen {name.split('.')[0]} is another one, as {name} shows; start from the weights that it began with"
            )


def _file_name(parameter: str) -> str:
    """network.x.lora_A.default -> network.x.lora_A, as LoRA files name factors; other names stay."""
    module, _, _ = parameter.rpartition(".")
    return module if module.endswith((".lora_A", ".lora_B", ".lora_magnitude")) else parameter


def _trained_part(stored: Tensor, parameter: Tensor) -> Tensor:
    """All of it, but for PiSSA, in whose file the frozen first factors follow the trained ones."""
    return stored[tuple(map(slice, parameter.shape))]


@torch.no_grad()
def _copy_into(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{name} has shape {tuple(source[name].shape)}, not {tuple(tensor.shape)}")
        local(tensor).copy_(rows_of(source[name], tensor))


def _lay_out_moments(state: dict[str, Any], parameters: Sequence[Tensor]) -> None:
    """Make moments that a run of any number of processes has saved those of this one's parameters."""
    for i, moments in state["state"].items():
        alike = {name: value for name, value in moments.items() if getattr(value, "shape", None) == parameters[i].shape}
        moments.update({name: laid_out_as(parameters[i], value) for name, value in alike.items()})
