"""Runs: everything that decides what one training does, as a key of its results and a name for its folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from .json_files import Record

RunT = TypeVar("RunT", bound="BaseRun")


@dataclass(frozen=True)
class BaseRun:
    """The settings that the runs of every program have; two equal runs are the same run.

    Attributes:
        PROGRAM: The program that does runs of this class, for messages.
        model: Folder or hub id of the checkpoint, as it was given.
        task: Name in the program's table of tasks.
        method: Name in `METHODS`.
        seed: Of everything that is drawn at random.
        lr: Peak learning rate.
    """

    PROGRAM: ClassVar[str]

    model: str
    task: str
    method: str
    seed: int
    lr: float

    @property
    def folder_name(self) -> str:
        """A name of its own for the run's folder, short and the same in every process."""
        settings = json.dumps(asdict(self), sort_keys=True).encode()
        return f"{self.task}-{self.method}-{self.seed}-{hashlib.sha256(settings).hexdigest()[:12]}"

    @classmethod
    def from_record(cls: type[RunT], record: Record) -> RunT:
        """Return the run that a record of a results file is of. JSON has made lists of its tuples.

        Raises:
            KeyError, TypeError, ValueError: If the record is none of such a run.
        """
        settings: dict[str, Any] = dict(record["run"])
        names = {field.name for field in fields(cls)}
        if lacking := sorted(names.difference(settings)):
            raise ValueError(f"it lacks {', '.join(lacking)}, as an older version wrote it")
        if unknown := sorted(set(settings).difference(names)):
            raise ValueError(f"it has the unknown settings {', '.join(unknown)}")
        tuples = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        return cls(**{**settings, **tuples})


@dataclass(frozen=True)
class ConfiguredRun(BaseRun):
    """A run whose method has settings beside those that its name stands for.

    Attributes:
        settings: What the method's `attach` is given besides, as JSON with sorted keys.
    """

    settings: str

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings as keyword arguments."""
        return json.loads(self.settings)

    @property
    def label(self) -> str:
        """The method and its settings, for people: `sparsegrad, rank 192`."""
        return ", ".join([self.method, *(f"{key} {_plain(value)}" for key, value in self.overrides.items())])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
