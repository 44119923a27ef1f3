"""Keeps what `question_check_measure` measured beside the feature set, so that a set is measured once for all runs with
one tokenizer and system prompt.

The cache holds what does not depend on the bounds of a run. It is a file in `question_checks/` of the set's folder, or
where that cannot be written, of its folder in `data.cache`, or of the user's cache folder. One process measures while
other ranks and jobs wait for its lock, then read. A file that cannot be read is made again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.core import choices
from pipeline.core.console import format_duration, logger
from pipeline.core.files import atomic_write, file_lock
from pipeline.core.ranks import read_ranks
from pipeline.data import chat_template as chat_template_module
from pipeline.data import conversation, plain_text, question_check_measure, template_parts
from pipeline.data.chat_template import ChatTemplate
from pipeline.data.feature_set import FeatureSet
from pipeline.data.question_check_measure import Measurements, measure

FOLDER = "question_checks"
_TOKENISING = (chat_template_module, choices, conversation, plain_text, question_check_measure, template_parts)
_HEAD_START_S = 1.0  # of the first rank of a node, whose progress appears on the console


def load_or_measure(feature_set: FeatureSet, chat_template: ChatTemplate) -> Measurements:
    """Returns the measurements of a set from the cache; measures, and writes the cache, if there are none.

    Raises:
        UserError: see `measure`.
    """
    name = f"{_key(feature_set, chat_template)}.npz"
    files = [folder / name for folder in _folders(feature_set)]
    count = len(feature_set.table)
    if (measured := _read(files, count)) is not None:
        return measured
    ranks = read_ranks()
    if ranks.local_rank:
        time.sleep(_HEAD_START_S)
    with ExitStack() as stack:
        locked = stack.enter_context(_lock(files))
        if (measured := _read(files, count)) is not None:  # another process measured while this one waited
            return measured
        cores = len(os.sched_getaffinity(0))
        start = time.monotonic()
        measured = measure(feature_set, chat_template, cores if locked else max(1, cores // ranks.local_world_size))
        logger.info(f"{feature_set.folder}: {count:,} questions checked in {format_duration(time.monotonic() - start)}")
        _write(files, measured)
        return measured


def _key(feature_set: FeatureSet, chat_template: ChatTemplate) -> str:
    """Returns a hash of everything that decides the measurements: texts, tokenizer, template and code."""
    digest = hashlib.sha256()
    parts = (
        feature_set.questions_sha256,
        _tokenizer_sha256(chat_template.tokenizer),
        chat_template.prefix,
        version("transformers"),
        version("tokenizers"),
    )
    digest.update("\n".join(map(str, parts)).encode())
    for module in _TOKENISING:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that decides how a tokenizer splits texts, and of its chat template."""
    digest = hashlib.sha256(f"{type(tokenizer).__name__}\n{tokenizer.chat_template}\n".encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr(sorted(tokenizer.added_tokens_decoder.items())).encode())
    for name in sorted(tokenizer.vocab_files_names):
        file = tokenizer.init_kwargs.get(name)
        if isinstance(file, str) and Path(file).is_file():
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _folders(feature_set: FeatureSet) -> list[Path]:
    """Returns the folders of caches in the order in which they are tried."""
    base = os.environ.get("XDG_CACHE_HOME")
    user = Path(base) if base else Path(os.environ.get("HOME", tempfile.gettempdir())) / ".cache"
    return [folder / FOLDER for folder in (*feature_set.local_folders, user / "pal")]


@contextmanager
def _lock(files: Sequence[Path]) -> Iterator[bool]:
    """Holds the lock in the first folder that can be written; yields whether there is one."""
    with ExitStack() as stack:
        yield any(_is_locked(file.with_suffix(".lock"), stack) for file in files)


def _is_locked(lock: Path, stack: ExitStack) -> bool:
    """Waits for a lock and enters it; returns False in a folder that cannot be written or locked."""
    try:
        try:
            stack.enter_context(file_lock(lock, 0))
        except TimeoutError:
            logger.info(f"another process checks the same questions; waiting for it ({lock})")
            stack.enter_context(file_lock(lock))
    except (OSError, NotImplementedError):  # the latter from filelock 3 on a file system without flock
        return False
    return True


def _read(files: Sequence[Path], count: int) -> Measurements | None:
    """Returns the measurements of `count` questions in the first of these files that is intact."""
    for file in files:
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
                tokens = arrays["tokens"].astype(np.int64)
                values = json.loads(arrays["json"].tobytes())
            faults = {int(index): (str(f[0]), str(f[1]), str(f[2])) for index, f in values["faults"].items()}
        except FileNotFoundError:
            continue
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            logger.info(f"{file} cannot be read ({type(error).__name__}); the questions are checked again")
            continue
        if tokens.shape == (count, 2) and all(0 <= index < count for index in faults):
            return Measurements(tokens[:, 0], tokens[:, 1], faults)
    return None


def _write(files: Sequence[Path], measured: Measurements) -> None:
    """Writes the measurements to the first folder that takes them; without one, the next start measures again."""
    values = json.dumps({"faults": measured.faults})
    data = io.BytesIO()
    np.savez_compressed(
        data,
        tokens=np.stack([measured.prefix_tokens, measured.suffix_tokens], axis=1).astype(np.int32),
        json=np.frombuffer(values.encode(), np.uint8),
    )
    errors = []
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, data.getvalue())
        except OSError as error:
            errors.append(f"{file.parent}: {error.strerror}")
        else:
            return
    logger.warning(f"checked questions cannot be kept ({'; '.join(errors)}): the next start checks them again")
