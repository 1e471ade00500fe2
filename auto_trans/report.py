"""What a conversion did, for callers and people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from auto_trans.sizes import format_bytes, plural
from auto_trans.storage.manifest import FileRecord

__all__ = ["ConversionReport"]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: The source file or folder.
        target: The target folder.
        files: The target files of the ranks that were asked for, by rank and name.
        converted: The ranks whose files were written; of a complete set rank 0 for every file.
        linked: The ranks whose files are links to (or copies of) those of an identical rank.
        reused: The ranks whose files were there already, made for the same request.
        bytes_written: Bytes of the files written, without links.
        seconds: Wall time.
        carried: Parameters that no strategy lists; copied as they are.
        absent: Parameters that the target lists and the source does not hold; the model keeps its initial values.
        dropped: Optimizer state that the target, which has no optimizer, does not take.
        with_lora: Parameters into which LoRA weights were merged.
    """

    source: Path
    target: Path
    files: tuple[FileRecord, ...]
    converted: tuple[int, ...] = ()
    linked: tuple[int, ...] = ()
    reused: tuple[int, ...] = ()
    bytes_written: int = 0
    seconds: float = 0.0
    carried: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    with_lora: tuple[str, ...] = ()

    @classmethod
    def merged(cls, reports: Sequence[ConversionReport]) -> ConversionReport:
        """One report of the parts of a conversion that ran beside each other."""
        return replace(
            reports[0],
            files=tuple(sorted((f for r in reports for f in r.files), key=lambda f: (f.rank, f.file))),
            converted=tuple(sorted(rank for r in reports for rank in r.converted)),
            linked=tuple(sorted(rank for r in reports for rank in r.linked)),
            reused=tuple(sorted(rank for r in reports for rank in r.reused)),
            bytes_written=sum(r.bytes_written for r in reports),
            seconds=max(r.seconds for r in reports),
        )

    def __str__(self) -> str:
        parts = [f"{len(self.converted)} converted", f"{len(self.linked)} linked", f"{len(self.reused)} reused"]
        size = format_bytes(self.bytes_written)
        return f"{self.target}: {', '.join(parts)} of {plural(len(self.files), 'file')}, {size} in {self.seconds:.1f} s"
