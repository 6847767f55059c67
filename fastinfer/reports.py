"""Report: what a patch replaced, what it left and why, bytes, error, backend."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A module that was (or, in a dry run, would be) replaced. `error` is ‖ŵ − w‖ / ‖w‖, None in a dry run."""

    path: str
    kind: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A module that stays, with the reason. `expected` ones stay by design and do not fail `strict`."""

    path: str
    reason: str
    bytes: int
    expected: bool


@dataclasses.dataclass(frozen=True)
class Merged:
    """Linears of a block (path) that run as one matmul, or the reason why they stay apart."""

    path: str
    members: tuple[str, ...]
    activation: str = "none"
    reason: str = ""

    def __str__(self) -> str:
        epilogue = "" if self.activation == "none" else f" ({self.activation})"
        return ", ".join(self.members) + (f": {self.reason}" if self.reason else epilogue)


@dataclasses.dataclass(frozen=True)
class Graphed:
    """A model (path) whose calls are recorded in CUDA graphs, how many are, or the reason why none is."""

    path: str
    recorded: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"not recorded: {self.reason}"
        return f"{self.recorded} kinds of calls recorded" if self.recorded else "calls are recorded as they repeat"


@dataclasses.dataclass
class Report:
    """What `patch` did. `str(report)` is a table; `to_dict()` is plain data for JSON."""

    replaced: list[Replaced] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    merged: list[Merged] = dataclasses.field(default_factory=list)
    apart: list[Merged] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    decode_step: str = ""
    """"fused, N layers", or why the forward of one token stays the model's own; empty where nothing is generated."""
    last_generate: str = ""
    """"fused", or why the last `generate` ran in transformers' own loop; empty before the first."""
    graphs: list[Graphed] = dataclasses.field(default_factory=list)
    backend: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    originals_held: int = 0
    originals_in_checkpoint: int = 0
    reversible: bool = True
    dry_run: bool = True
    seconds: float = 0.0

    @property
    def step_fused(self) -> bool:
        return self.decode_step.startswith("fused")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        mb = 1e-6
        head = (
            f"fastinfer: {len(self.replaced)} weights replaced, {len(self.skipped)} left, "
            f"{self.bytes_before * mb:.1f} → {self.bytes_after * mb:.1f} MB, {self.seconds:.1f} s, on {self.backend}"
        )
        originals = (
            f"originals: {self.originals_held * mb:.1f} MB held in host memory, "
            f"{self.originals_in_checkpoint * mb:.1f} MB in the checkpoint"
            if self.reversible
            else "originals: not kept (reversible=False)"
        )
        if self.dry_run:
            originals = "dry run: nothing was changed"
        notes = [f"note: {note}" for note in self.notes]
        notes += [f"decode step: {self.decode_step}"] if self.decode_step else []
        notes += [f"last generate: {self.last_generate}"] if self.last_generate else []
        graphs = [f"CUDA graphs{f' of {row.path}' if row.path else ''}: {row}" for row in self.graphs]
        lines = [head, originals, *notes, *graphs, ""]
        lines += ["replaced" + " " * 52 + "     MB →      MB   error"] if self.replaced else []
        for paths, rows in _collapse(self.replaced, lambda r: (r.kind, r.note)):
            before, after = sum(r.bytes_before for r in rows) * mb, sum(r.bytes_after for r in rows) * mb
            errors = [r.error for r in rows if r.error is not None]
            error = f"{max(errors):7.4f}" if errors else "      –"
            note = f"  {rows[0].note}" if rows[0].note else ""
            lines.append(f"  {paths:<44} {rows[0].kind:<12} {before:8.2f} → {after:7.2f} {error}{note}")
        for title, blocks in (("merged", self.merged), ("not merged", self.apart)):
            for path, rows in _collapse(blocks, str):
                lines.append(f"{title}: {path:<{56 - len(title)}} {rows[0]}")
        lines += ["left"] if self.skipped else []
        for paths, rows in _collapse(self.skipped, lambda r: r.reason):
            lines.append(f"  {paths:<57} {sum(r.bytes for r in rows) * mb:8.2f}  {rows[0].reason}")
        return "\n".join(lines)


def _collapse(rows, key):
    """Rows that differ only in numbers inside their path, as one: "layer.{0–5}.query"."""
    groups = defaultdict(list)
    for row in rows:
        groups[re.sub(r"\d+", "#", row.path), key(row)].append(row)
    for (pattern, _), members in groups.items():
        path = members[0].path
        if len(members) > 1 and "#" in pattern:
            path = pattern
            numbers = zip(*(re.findall(r"\d+", m.path) for m in members))
            for column in numbers:
                seen = sorted({int(n) for n in column})
                text = str(seen[0]) if len(seen) == 1 else f"{{{seen[0]}–{seen[-1]}}}"
                path = path.replace("#", text, 1)
        yield path, members
