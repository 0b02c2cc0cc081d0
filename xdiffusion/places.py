"""Where the commands put what they make, unless a flag or a config says otherwise."""

from pathlib import Path

OUTPUT_ROOT = Path("output")
JUDGE_FOLDER = OUTPUT_ROOT / "judge"
CACHE_FOLDER = "output/cache"  # a literal: the schema of configs reads it from this source
