"""The contract of a prepared feature set: `features.json`, which preparation writes last and every reader checks.

A feature set is a folder:

    features.json            this contract; a folder without it is not a feature set
    clips/                   MDS shards, one sample per clip: clip_id, duration_s, dataset, domain, questions, audio
    <encoder>/               MDS shards, one sample per clip in the same order: clip_id, features (frames, width)
    rejects.jsonl            clips and conversations that were left out: clip_id, question_id, reason

Questions are stored apart from features, so that they can be replaced or selected by task without touching features.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from pipeline.core.errors import UserError
from pipeline.core.records import Strict

CONTRACT_FILE = "features.json"
ENCODERS_FILE = "encoders.json"  # in the folder of a model
CLIPS = "clips"

# MDS column types (mosaicml-streaming). Arrays store their own shape, because clips differ in length. `audio` is the
# path or URL of the audio with the fragment of its segment (`a.flac#t=3,5.5`), empty in a set without audio.
CLIP_COLUMNS = {
    "clip_id": "str",
    "duration_s": "float64",
    "dataset": "str",
    "domain": "str",
    "questions": "json",
    "audio": "str",
}
OPTIONAL_COLUMNS = {"audio"}  # sets of earlier versions lack it
_STORED_IF_SET = {"dataset", "domain", "system", "turns", "clips"}
FEATURE_COLUMNS = {"clip_id": "str", "features": "ndarray:float16"}


class Turn(Strict):
    """One turn of a conversation.

    Attributes:
        content: texts and indices of the conversation's clips in the order in which the model reads them: 0 is the clip
            that the question belongs to, 1, 2, ... are `Question.clips`. An answer is a single text.
        loss: whether an answer is trained on; it stays in the history in either case.
    """

    role: Literal["user", "assistant"]
    content: list[str | int]
    loss: bool = True


class Question(Strict):
    """One question about a clip, or a conversation that begins with it.

    Attributes:
        question_id: id that is unique in the feature set.
        question, answer: text of the last user turn, with `<audio>` for its clips except those in front of all text,
            and the last answer.
        dataset, domain: those of the question where they differ from the clip's, because several datasets ask about
            the same audio; None, which is not stored, means the clip's.
        system: system text in place of `data.system_prompt`; None, which is not stored, means that one.
        turns: all turns, user and assistant alternating, the last of which is the answer; None, which is not stored,
            means a user turn of the clip and the question, and the answer.
        clips: ids of the other clips that the turns name; None, which is not stored, means no others.
    """

    question_id: str
    question: str
    answer: str
    task: str = "unspecified"
    choices: list[str] | None = None
    dataset: str | None = None
    domain: str | None = None
    system: str | None = None
    turns: list[Turn] | None = None
    clips: list[str] | None = None

    @property
    def conversation(self) -> list[Turn]:
        """All turns; those of a plain question are its clip with its text, and its answer."""
        if self.turns is not None:
            return self.turns
        return [Turn(role="user", content=[0, self.question]), Turn(role="assistant", content=[self.answer])]

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if value is not None or key not in _STORED_IF_SET}


class EncoderContract(Strict):
    """How one column of features was computed; two columns with the same fingerprint are interchangeable.

    Attributes:
        kind: encoder class that computed it (`log_mel`, `whisper`, ...).
        revision: revision of the code that computes the features; weights are identified by their hash.
        weights_sha256: hash of the weights; None for an encoder without weights.
        sample_rate_hz: sample rate of the audio that the encoder reads.
        frame_rate_hz: frame rate of the stored features.
        width: number of values in a stored frame.
        dtype: type of the stored values.
        grid: (time, frequency) cells per window for encoders with a two-dimensional output, else None.
        window_s: longest audio that the encoder processes at once; None for no limit.
        options: every other setting that changes the features.
        software: package versions that change the features in the last digits; not part of the fingerprint.
    """

    kind: str
    revision: str
    weights_sha256: str | None = None
    sample_rate_hz: int
    frame_rate_hz: float
    width: int
    dtype: Literal["float16"] = "float16"
    grid: tuple[int, int] | None = None
    window_s: float | None = None
    options: dict[str, Any] = {}
    software: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        """Hash (16 hex digits) of everything that changes the features beyond rounding."""
        canonical = json.dumps(self.model_dump(mode="json", exclude={"software"}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class FeatureContract(Strict):
    """The contents of a feature set.

    Attributes:
        encoders: encoder name -> how its features were computed.
        clips, questions: numbers of clips and questions in the set; conversations about a clip that was left out do not
            count, and readers leave them out.
        rejected: number of clips and conversations that were left out.
        audio_hours: duration of all clips.
        manifest_sha256: hash of the manifest that the set was prepared from.
    """

    format_version: Literal[1] = 1
    encoders: dict[str, EncoderContract]
    clips: int
    questions: int
    rejected: int
    audio_hours: float
    manifest_sha256: str

    @property
    def fingerprint(self) -> str:
        """Hash (16 hex digits) of all encoders; equal for training and held-out sets of the same encoders."""
        canonical = json.dumps({name: e.fingerprint for name, e in self.encoders.items()}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def dump(self) -> str:
        """Returns the text of `features.json`, including the fingerprint, which `load_contract` checks."""
        values = {**self.model_dump(mode="json"), "fingerprint": self.fingerprint}
        return json.dumps(values, indent=2) + "\n"


def write_encoders(folder: Path, contract: FeatureContract, encoders: list[str]) -> None:
    """Writes the contracts of these encoders to the folder of a model that was trained on their features."""
    contracts = {
        name: contract.encoders[name].model_dump(mode="json") for name in encoders if name in contract.encoders
    }
    (folder / ENCODERS_FILE).write_text(json.dumps(contracts, indent=2) + "\n", encoding="utf-8")


def read_encoders(folder: Path, fingerprints: dict[str, str], training_set: str) -> dict[str, EncoderContract]:
    """Returns the contracts of the encoders that a model was trained with, by encoder name.

    Args:
        folder: folder of the model.
        fingerprints: encoder name -> fingerprint that the model was trained on.
        training_set: feature set with the contracts of a model that was saved without them.

    Raises:
        UserError: the contracts are in neither place, or an encoder differs from the model's.
    """
    file = folder / ENCODERS_FILE
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        contracts = {name: EncoderContract.model_validate(contract) for name, contract in values.items()}
    else:
        try:
            contracts = load_contract(training_set).encoders
        except UserError as error:
            fault = f"holds no {ENCODERS_FILE}, and the set it was trained on cannot be read ({error.where})"
            raise UserError(folder, fault, "export the model again on a machine that has its training set") from error
    for name, fingerprint in fingerprints.items():
        if name not in contracts or contracts[name].fingerprint != fingerprint:
            fault = f"does not describe the encoder '{name}' ({fingerprint}) that {folder} was trained with"
            where = file if file.is_file() else training_set
            raise UserError(where, fault, "export the model again on a machine that has its training set")
    return {name: contracts[name] for name in fingerprints}


def load_contract(folder: str | Path) -> FeatureContract:
    """Reads `features.json` of a prepared set.

    Args:
        folder: local path of the set, or its URL in an object store.

    Raises:
        UserError: the folder is not a finished feature set, or its contract is damaged.
    """
    path = f"{str(folder).rstrip('/')}/{CONTRACT_FILE}"
    try:
        values = json.loads(_read(path))
        fingerprint = values.pop("fingerprint", None)
        contract = FeatureContract.model_validate(values)
    except (ValueError, AttributeError, ValidationError) as error:
        raise UserError(path, f"is damaged ({str(error).splitlines()[0]})", "prepare the set again") from error
    if fingerprint != contract.fingerprint:
        raise UserError(path, "does not match its own fingerprint", "prepare the set again")
    return contract


def _read(path: str) -> str:
    if "://" in path:
        import fsspec

        try:
            text: str = fsspec.filesystem(path.partition("://")[0]).cat_file(path).decode()
        except Exception as error:  # every kind of object store raises exceptions of its own
            remedy = "check the credentials and the network, and that `pal prepare` has finished the set"
            raise UserError(path, f"cannot be read ({error})", remedy) from error
        return text
    folder = Path(path).parent
    if not Path(path).is_file():
        fault = "is not a finished feature set" if folder.is_dir() else "does not exist"
        raise UserError(folder, f"{fault} (no {CONTRACT_FILE})", "make it with `pal prepare`")
    return Path(path).read_text(encoding="utf-8")


def require_encoders(contract: FeatureContract, encoders: list[str], folder: str | Path) -> None:
    """Checks that the set holds the features that a model reads.

    Raises:
        UserError: the set holds no features of an encoder.
    """
    for name in encoders:
        if not contract.encoders:
            fault = f"is a set of text without audio, and '{name}' is among the encoders of the model"
            remedy = "train a model with model.integration=none on it, or mix it into a set with audio (data.mixture)"
            raise UserError(folder, fault, remedy)
        if name not in contract.encoders:
            raise UserError(
                folder,
                f"holds features of {', '.join(contract.encoders)}, not of '{name}' in model.encoders",
                "change model.encoders or prepare this set with that encoder",
            )


def require_text(contract: FeatureContract, folder: str | Path) -> None:
    """Checks that the questions of a set are about no clip, for a model that has no encoder.

    Raises:
        UserError: they are about clips.
    """
    if contract.encoders:
        fault = f"asks about clips ({', '.join(contract.encoders)}), and the model has no encoder to read them"
        raise UserError(
            folder, fault, "choose model.encoders and model.integration, or prepare a set with encoders: {}"
        )


def require_same_features(
    expected: dict[str, str], contract: FeatureContract, folder: str | Path, wanted_by: str
) -> None:
    """Checks fingerprints, so that a model never reads features of another encoder.

    Args:
        expected: encoder name -> fingerprint that the model was trained on.
        folder: location of the set, for the message.
        wanted_by: what expects these features, for the message ("the model").

    Raises:
        UserError: an encoder differs or is missing.
    """
    require_encoders(contract, list(expected), folder)
    for name, fingerprint in expected.items():
        actual = contract.encoders[name].fingerprint
        if actual != fingerprint:
            raise UserError(
                folder,
                f"features of '{name}' have fingerprint {actual}, but {wanted_by} was made with {fingerprint}",
                "prepare this set with the same encoder settings",
            )
