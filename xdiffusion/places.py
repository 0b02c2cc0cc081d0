"""Where the commands put what they make, unless a flag or a config says otherwise."""

from pathlib import Path

OUTPUT_ROOT = Path("output")
JUDGE_FOLDER = OUTPUT_ROOT / "judge"
CACHE_FOLDER = "output/cache"  # a literal: the schema of configs reads it from this source


def sample_folder(dataset: str, checkpoint: Path, config_path: str | None, *, in_run: bool) -> Path:
    """Where a checkpoint's samples go.

    Args:
        in_run: it lies in the folder of its run, which is named by the config; other files lie beside each other.
    """
    path = checkpoint.absolute()
    if in_run:
        name = Path(config_path).stem if config_path else path.parent.name
    else:
        name = path.name if path.is_dir() else path.stem
    return OUTPUT_ROOT / dataset / "sample" / name
