"""The bundled tiny CLIP: an ordinary open_clip model that needs no download.

It was trained on drawn scenes only (`d2filter.tools.scenes`), so its scores mean nothing on
photographs: it is for trying d2filter out and for tests.  See README.md in this directory.

`config.json` is an open_clip model config but for one thing.  The usual table of 49,408 tokens
would be larger than the rest of the model, so the model uses the first `vocab_size - 514` merges
of open_clip's own list.  `register` cuts that list out of the installed open_clip and registers
the config with the path of the result, which is why the name does not exist before.
"""

from __future__ import annotations

import atexit
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from d2filter.errors import DependencyError

MODEL_NAME = "d2filter-tiny"
"""The name for `open_clip.create_model_and_transforms` and `open_clip.get_tokenizer`."""

WEIGHTS = Path(__file__).parent / "weights.safetensors"
"""The trained weights, float16; open_clip loads them as float32."""

CONFIG = Path(__file__).parent / "config.json"
"""The open_clip config, but for the tokenizer's path."""

# 256 bytes, each also as the end of a word, and the start and end tokens.
_TOKENS_WITHOUT_MERGES = 2 * 256 + 2
MERGES_SHA256 = "4a54700c613d9e463f2c36cf4727ac5080e2737e0a4c4da53e5ec2a34a80922c"


def register() -> None:
    """Make `MODEL_NAME` known to open_clip in this process.  Calling it again is harmless.

    The merge list and the resolved config go to a directory named by their content, under
    `$XDG_CACHE_HOME` or `~/.cache`, or, where that cannot be written, under a fresh temporary
    directory.  Every file is replaced as a whole, so any number of processes may do this at once.

    Raises DependencyError when the installed open_clip carries another merge list than the weights
    were trained with: token ids would silently mean other words.
    """
    import open_clip

    known = open_clip.get_model_config(MODEL_NAME)
    # A cache may be emptied under a process that lives long: then write it anew.
    if known and Path(known["text_cfg"]["tokenizer_kwargs"]["bpe_path"]).is_file():
        return
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    count = config["text_cfg"]["vocab_size"] - _TOKENS_WITHOUT_MERGES
    merges = _first_merges(count)
    # mtime=0: the same list must be the same bytes, whoever writes it.
    packed = gzip.compress(merges, mtime=0)
    name = hashlib.sha256(CONFIG.read_bytes() + packed).hexdigest()[:16]
    open_clip.add_model_config(_publish(f"{MODEL_NAME}-{name}", config, packed))


def _first_merges(count: int) -> bytes:
    """The header line and the first `count` merges of open_clip's list, without a last newline."""
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = [next(file).rstrip("\n") for _ in range(count + 1)]
    # The tokenizer drops the first line, and would take an empty last one for a merge.
    merges = "\n".join(lines).encode("utf-8")
    found = hashlib.sha256(merges).hexdigest()
    if found != MERGES_SHA256:
        raise DependencyError(
            f"the first {count} merges of {default_bpe()} have sha256 {found}, but {MODEL_NAME} was"
            f" trained with {MERGES_SHA256}; install open_clip_torch as pinned by d2filter"
        )
    return merges


def _publish(name: str, config: dict[str, dict[str, object]], packed: bytes) -> Path:
    """Write merge list and resolved config into a directory called `name`; the config's path."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return _write(cache / "d2filter" / name, config, packed)
    except (OSError, RuntimeError):
        # Containers often have a home that is read-only, or (RuntimeError) none at all.  The
        # directory is this process's own: a name that others can guess could be taken by them.
        private = Path(tempfile.mkdtemp(prefix="d2filter-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return _write(private / name, config, packed)


def _write(folder: Path, config: dict[str, dict[str, object]], packed: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    merges = folder.resolve() / "merges.txt.gz"
    _replace(merges, packed)
    text_cfg = {**config["text_cfg"], "tokenizer_kwargs": {"bpe_path": str(merges)}}
    # open_clip takes the model's name from the name of the file.
    resolved = folder / f"{MODEL_NAME}.json"
    _replace(resolved, json.dumps({**config, "text_cfg": text_cfg}, indent=2).encode("utf-8"))
    return resolved


def _replace(path: Path, data: bytes) -> None:
    """Publish `data` at `path` in one step; nothing to do where it stands already."""
    if path.is_file() and path.read_bytes() == data:
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
