"""What the entry scripts share: one-line errors, flags that become config overrides, and calls of one another.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import math
import os
import re
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from xdiffusion.memory import TAKES_LESS, is_full_memory
from xdiffusion.streams import CONTROLS, lasting_output, plain_terminal

REPOSITORY = Path(__file__).resolve().parents[1]
USAGE_ERROR = 2
LONGEST_ERROR = 4000  # letters
AT_HOME = re.compile(r"^(--\w+=|)~/")  # a word of a command line
TEXT_FLAGS = ("--prompt", "--negative_prompt", "--sample_prompt")  # whose words are no paths


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None, *, lasting: bool = False) -> int:
    """Call main(argv) and return its exit status; a user's mistake (ValueError), and what the system refuses (OSError), becomes
    one line and status 2, a full memory one line and status 1.

    Where it is `lasting`, as a training is, it goes on although nobody reads its output any more; else it ends then.

    Set XDIFFUSION_TRACEBACK=1 to see where an error was raised.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin while they wait; by default so long that another busy process makes a step 20 times slower
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        with _terminating(), plain_terminal(), lasting_output() if lasting else contextlib.nullcontext():
            return main(argv) or 0
    except BrokenPipeError:  # the reader of the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at its end
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("XDIFFUSION_TRACEBACK"):
            raise
        text = str(error)[: 2 * LONGEST_ERROR]  # names of any length that a file has chosen may be in it
        print(CONTROLS.sub("?", f"error: {shorten(text, LONGEST_ERROR, placeholder=' ...')}"), file=sys.stderr)
        return USAGE_ERROR
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("XDIFFUSION_TRACEBACK") or not is_full_memory(error):
            raise
        text = " ".join(str(error).split()) or "the memory is full"
        print(f"error: {shorten(text, LONGEST_ERROR, placeholder=' ...')}; {TAKES_LESS}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, _Terminated) as stop:  # a training takes both itself from its first step on
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        print(f"stopped by {number.name}", file=sys.stderr)
        return 128 + number


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Within this block SIGTERM is raised, so that a command can say that it was stopped, and clean up."""

    def stop(number: int, frame: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # a script that another one calls, or somebody else's handler
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """A command's flags; its help shows the text as written, and an error is one line, as all errors are.

    `--flag=~/x` is read as `--flag ~/x`, in which a shell puts the home folder; a prompt stays as it is.
    """

    def __init__(self, description: str | None = None, **settings: Any):
        # flags are written out: what a command was is read again, from run.json and from pictures
        shared = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **shared, **settings)
        self.settable: str | None = None  # how the config keys begin that --set takes
        self._words: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        pairs = list(zip(["", *given], given))
        self._words = [
            word if {before, word.partition("=")[0]} & {*TEXT_FLAGS} else AT_HOME.sub(rf"\1{Path.home()}/", word)
            for before, word in pairs
        ]
        for before, word in pairs:
            flag = before if word == "" else word[:-1] if word.endswith("=") else None
            action = self._option_string_actions.get(flag)
            if action and action.nargs != 0 and flag not in TEXT_FLAGS:  # a variable of the shell that is not set
                self.error(f"{flag} is empty; {'it is needed' if action.required else 'leave it out for the default'}")
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        meant = "".join(self._meant()) if self.add_help else ""  # without help it looks for some flags of many
        print(f"error: {message}{meant} (--help lists the flags)", file=sys.stderr)
        sys.exit(USAGE_ERROR)

    def flags(self) -> list[str]:
        """All flags, with those of the sub-commands."""
        below = [a.choices.values() for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        return [*self._option_string_actions, *(flag for parsers in below for p in parsers for flag in p.flags())]

    def _meant(self) -> Iterator[str]:
        """What the user may have meant by each flag that there is not."""
        known = self.flags()
        for flag in (word.partition("=")[0] for word in self._words if word.startswith("--")):
            if flag in known:
                continue
            prefix = self.settable
            keys = [key for key in _config_keys(flag) if key.startswith(prefix)][:2] if prefix is not None else []
            meant = [f"--set {key}=..." for key in keys] or difflib.get_close_matches(flag, known, n=1)
            if meant:
                yield f"; {flag}: did you mean {' or '.join(meant)}?"


def _config_keys(flag: str) -> list[str]:
    """The config keys that are called as a flag is."""
    from xdiffusion.build import SCHEMA
    from xdiffusion.config import keys_named

    return keys_named(flag.strip("-").replace("-", "_"), SCHEMA)


def call_script(script: str, *arguments: object) -> str:
    """Run an entry script of the repository in this process (its imports are paid for once).

    Returns:
        What it printed, if that was JSON.

    Raises:
        ValueError: if the script failed without saying why as an error of its own.
        KeyboardInterrupt, _Terminated: if a signal stopped it.
    """
    words = [str(a) for a in arguments]
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    main = runpy.run_path(str(REPOSITORY / script))["main"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if "--json" in words else contextlib.nullcontext():
        status = main(words)
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status == 128 + signal.SIGTERM:
        raise _Terminated
    if status:
        raise ValueError(f"{script} ended with status {status}")
    print(printed.getvalue(), end="")
    return printed.getvalue()


SAMPLING_FLAGS = {  # config key by flag
    "guidance": "sampling.cfg_scale",
    "sampling_steps": "sampling.steps",
    "sampler": "sampling.sampler.kind",
    "times": "sampling.times.kind",
    "negative_prompt": "sampling.negative_prompt",
}


def add_model_flags(parser: Parser) -> None:
    """The flags of every command that draws from a finished model: which model, and `SAMPLING_FLAGS`."""
    add = parser.add_argument
    agree = (
        "optional: a checkpoint of ours carries its config; this must be of the same model, and its section sampling: is "
        "used (flags beat it); for others what they do not say"
    )
    setting = "set a key of the section sampling:, such as sampling.clip_x0=false; repeatable"
    add(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="a model of training/image/train.py, or Stable Diffusion 1.5 or 2.1: an original file or a diffusers folder",
    )
    add("--config_path", metavar="YAML", help=agree)
    add_ema_flag(parser)
    add("--guidance", type=finite, metavar="SCALE", help="classifier-free guidance, 1 = none (default: the config's)")
    add("--sampling_steps", type=positive_int, metavar="N", help="steps of the sampler (default: the config's)")
    add(
        "--sampler",
        metavar="NAME",
        help="ancestral, ddim, heun, dpm_solver, euler or euler_ancestral (default: the config's)",
    )
    add("--times", metavar="NAME", help="its grid: uniform, logsnr, karras or timesteps (default: the config's)")
    add("--negative_prompt", metavar="TEXT", help="what guidance leads away from (default: nothing)")
    add("--force_cpu", action="store_true", help="do not use a GPU that is there")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    parser.settable = "sampling."


def add_run_flags(parser: Parser) -> None:
    """The flags of every command that trains."""
    add = parser.add_argument
    setting = "set any config key, such as optimizer.learning_rate=1e-3; repeatable"
    add("--config_path", required=True, metavar="YAML", help="the config; every flag below beats it")
    add("--num_training_steps", type=positive_int, metavar="N", help="optimizer steps")
    add("--save_and_sample_every_n", type=positive_int, metavar="N", help="steps between checkpoints with a picture")
    add("--resume_from", metavar="FILE", help="continue a run from one of its checkpoints, or 'auto' from its newest")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="autocast; what is trained stays float32")
    add("--force_cpu", action="store_true", help="do not use a GPU that is there")
    add("--seed", type=int, metavar="N", help="of weights, data order, noise and captions")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    parser.settable = ""


def add_ema_flag(parser: argparse.ArgumentParser) -> None:
    """--ema and --no-ema, for files that hold a UNet twice."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of a Stable Diffusion that holds its UNet twice, take the moving average or not (default: of an original file "
        "not; of a folder yes)",
    )


def overrides_from_flags(args: argparse.Namespace, keys: dict[str, str]) -> list[str]:
    """`--set` assignments, then the flags that were given, as KEY=VALUE; a flag beats the config and `--set`.

    Args:
        args: parsed; a flag that was not given is None.
        keys: config key by flag name.
    """
    from xdiffusion.config_files import assignment

    given = {key: getattr(args, flag) for flag, key in keys.items()}
    return [*args.set, *(assignment(key, value) for key, value in given.items() if value is not None)]


@contextlib.contextmanager
def naming_flags(args: argparse.Namespace, keys: dict[str, str]) -> Iterator[None]:
    """What is said in this block of a config key that a flag has set also names the flag, which the user has typed."""
    try:
        yield
    except ValueError as error:
        flags = [flag for flag, key in keys.items() if getattr(args, flag) is not None and key in str(error)]
        if not flags:
            raise
        given = getattr(args, flags[0])
        value = "" if isinstance(given, list) else f" {given}"  # of several, the error names the one
        raise type(error)(f"--{flags[0]}{value}: {error}") from error


@contextlib.contextmanager
def sampling_overrides(args: argparse.Namespace, keys: dict[str, str]) -> Iterator[list[str]]:
    """`overrides_from_flags` for a finished model, of which `--set` can change nothing but the section sampling:.

    Within the block `naming_flags` holds.

    Raises:
        ValueError: for a `--set` of another section, which would have no effect.
    """
    for assignment in args.set:
        if not assignment.startswith("sampling."):
            raise ValueError(f"--set {assignment!r}: only keys of the section sampling: can be set here")
    with naming_flags(args, keys):
        yield overrides_from_flags(args, keys)


def number_type(kind: type, fits: Callable[[Any], bool], allowed: str) -> Callable[[str], Any]:
    """An argparse type: numbers of a kind that fit; `allowed` says in an error which these are."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} must be {allowed}")

    return parse


finite = number_type(float, math.isfinite, "a finite number")
two_or_more = number_type(int, lambda number: number >= 2, "a whole number of at least 2")
positive_int = number_type(int, lambda number: number >= 1, "a whole number of at least 1")
seed_number = number_type(int, lambda number: 0 <= number < 2**63, "a whole number from 0 to 2^63 - 1")
