"""Columns and rows -> aligned text and Markdown; numbers -> text with the digits they deserve."""

from dataclasses import dataclass

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text. Columns whose title is in `words` are set flush left, numbers flush right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    """What marks in the cells refer to."""

    def aligned_text(self) -> str:
        """Lay the table out for a terminal."""
        lines = (self.columns, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if title in self.words else cell.rjust(width)
                for cell, width, title in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """Write the table and its notes as Markdown."""
        rule = [":--" if title in self.words else "--:" for title in self.columns]
        lines = [self.columns, rule, *self.rows]
        table = "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in lines)
        return table + "".join(f"\n\n{note}" for note in self.notes)


def format_ms(value: float | None) -> str:
    """Write milliseconds with three digits."""
    return NOTHING if value is None else _three_digits(value)


def format_rate(value: float | None) -> str:
    """Write images a second with three digits."""
    return NOTHING if value is None else _three_digits(value)


def format_ratio(value: float | None) -> str:
    """Write a ratio with two decimals."""
    return NOTHING if value is None else f"{value:.2f}"


def format_ratio_and_range(ratio: float, low: float, high: float) -> str:
    """Write a ratio, and in brackets from where to where it strayed."""
    return f"{format_ratio(ratio)} ({format_ratio(low)} to {format_ratio(high)})"


def format_percent(fraction: float, decimals: int = 1) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * fraction:.{decimals}f} %"


def format_bytes(value: int) -> str:
    """Write bytes as MB or GB."""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
