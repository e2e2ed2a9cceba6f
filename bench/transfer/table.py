"""What was measured, a row for each way and number of blocks, and what the goals say of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Medium(Enum):
    GRPC = "grpc"
    SHM = "shm"
    NIXL = "nixl"


class Kind(Enum):
    """What was moved, and how (see bench/transfer/__init__.py)."""

    RAW = "raw"
    BLOCKS = "blocks"
    DIGEST = "+ digest"
    FRAGMENTED = "fragmented"
    FETCH = "fetch"
    HANDOVER = "hand-over"


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds. The ratio of the best rounds is what a busy machine hides."""

    shape: str
    block_bytes: int
    medium: Medium
    kind: Kind
    num_blocks: int
    num_rounds: int
    ms: float
    gb_per_s: float
    ratio: float | None = None  # of the raw copy of the same bytes over the same medium
    ratio_best: float | None = None
    cpu_s_per_gb: float | None = None  # of both processes, user and system
    beyond_ms_p50: float | None = None  # of a whole hand-over beyond the raw copy
    beyond_ms_p99: float | None = None


@dataclass(frozen=True, slots=True)
class Safety:
    """What verification adds to the first token of a prompt over one medium."""

    medium: Medium
    num_tokens: int
    num_rounds: int
    ttft_ms: float
    digests_ms: float  # hand-over with digests less without: what nothing else hid
    generations_ms: float
    all_digests_ms: float  # of both ends, had nothing run beside them

    @property
    def share(self) -> float:
        """Of TTFT, as measured: the difference of two hand-overs, which a busy machine may turn around."""
        return (self.digests_ms + self.generations_ms) / self.ttft_ms

    @property
    def share_if_nothing_hid_it(self) -> float:
        return (self.all_digests_ms + self.generations_ms) / self.ttft_ms


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal of issue 5 and every figure it is about."""

    text: str
    figures: tuple[tuple[str, float], ...]
    limit: float
    is_least: bool
    unit: str

    def line(self) -> str:
        missed = [
            f"{name} {figure:.1f} {self.unit}"
            for name, figure in self.figures
            if (figure < self.limit if self.is_least else figure > self.limit)
        ]
        met = f"{self.text}: {len(self.figures) - len(missed)} of {len(self.figures)} met"
        return met + (f"; missed: {', '.join(missed)}" if missed else "")


HEADER = (
    f"{'shape':<6}{'way':<17}{'blocks':>7}{'rounds':>7}{'ms':>10}{'GB/s':>7}{'of raw':>8}{'best':>7}{'CPU s/GB':>10}"
    f"{'beyond p50':>12}{'p99 ms':>9}"
)


def line(row: Row) -> str:
    return (
        f"{row.shape:<6}{row.medium.value + ' ' + row.kind.value:<17}{row.num_blocks:>7}{row.num_rounds:>7}"
        f"{row.ms:>10.2f}{row.gb_per_s:>7.2f}{_percent(row.ratio):>8}{_percent(row.ratio_best):>7}"
        f"{_or_empty(row.cpu_s_per_gb):>10}{_or_empty(row.beyond_ms_p50):>12}{_or_empty(row.beyond_ms_p99):>9}"
    )


def safety_line(safety: Safety) -> str:
    return (
        f"safety {safety.medium.value}, {safety.num_tokens} tokens, {safety.num_rounds} rounds: "
        f"TTFT {safety.ttft_ms:.0f} ms; on the way to the first token digests {safety.digests_ms:+.2f} ms, generations "
        f"{safety.generations_ms:.2f} ms: {100 * safety.share:.2f} % (goal 3 %); all digests of both ends, had nothing "
        f"hidden them, {safety.all_digests_ms:.1f} ms: {100 * safety.share_if_nothing_hid_it:.2f} %"
    )


def goals(rows: Sequence[Row], safeties: Sequence[Safety]) -> list[Goal]:
    """Bandwidth goals are about bytes, not round trips: they are held to moves of 32 MiB and more."""

    def ratios(kind: Kind) -> tuple[tuple[str, float], ...]:
        return tuple(
            (f"{row.shape} x {row.num_blocks}", 100 * row.ratio)
            for row in rows
            if row.medium is Medium.NIXL and row.kind is kind and row.ratio is not None
            if row.num_blocks * row.block_bytes >= 32 << 20
        )

    def beyond(medium: Medium) -> tuple[tuple[str, float], ...]:
        return tuple(
            (f"{row.shape} x {row.num_blocks}", row.beyond_ms_p50)
            for row in rows
            if row.medium is medium and row.kind is Kind.HANDOVER and row.beyond_ms_p50 is not None
        )

    shares = tuple(
        (f"{each.medium.value} {each.num_tokens} tokens", 100 * max(each.share, each.share_if_nothing_hid_it))
        for each in safeties
    )
    found = [
        Goal("nixl, neighbours, 32 MiB and more: at least 80 % of raw", ratios(Kind.BLOCKS), 80, True, "%"),
        Goal("nixl, no two neighbours: at least 60 % of raw", ratios(Kind.FRAGMENTED), 60, True, "%"),
        *(
            Goal(f"{medium.value} hand-over beyond bytes/bandwidth, p50: at most 5 ms", beyond(medium), 5, False, "ms")
            for medium in Medium
        ),
        Goal("safety: at most 3 % of TTFT", shares, 3, False, "%"),
    ]
    return [goal for goal in found if goal.figures]


def median_ms(seconds: Iterable[float]) -> float:
    return 1000 * statistics.median(seconds)


def _percent(ratio: float | None) -> str:
    return f"{100 * ratio:.0f} %" if ratio is not None else ""


def _or_empty(figure: float | None) -> str:
    return f"{figure:.2f}" if figure is not None else ""
