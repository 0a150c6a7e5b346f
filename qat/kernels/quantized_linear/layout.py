"""What a kernel must know of a packed weight besides its numbers."""

from typing import NamedTuple

# Values are codes minus a zero point; entries of a table; or entries that are whole numbers of -64 ... 63, over 64.
INTEGERS, TABLE, GRID_TABLE = "integers", "table", "grid_table"


class Layout(NamedTuple):
    """Sizes and meaning of a weight in tile order.

    rows, columns: of the weight, `[out, in]`.
    bits: of a code; 2, 3, 4 or 8.
    kind: how codes decode; see above.
    center: the zero point that all share; None where each group has its own, or for tables.
    group: columns that share a scale, 32, 64 or 128; 0 for one scale a row.
    """

    rows: int
    columns: int
    bits: int
    kind: str = INTEGERS
    center: int | None = None
    group: int = 0

    @property
    def tables(self) -> bool:
        """Whether codes select from a table."""
        return self.kind != INTEGERS

    @property
    def has_zeros(self) -> bool:
        """Whether zero points are stored."""
        return self.kind == INTEGERS and self.center is None

    @property
    def table_words(self) -> int:
        """Words of a table: bytes of its entries, for a plain one low bytes and then high bytes, in whole fours."""
        entries = 2**self.bits
        words = entries // 4 * (1 if self.kind == GRID_TABLE else 2)
        return max(4, words) if self.tables else 0
